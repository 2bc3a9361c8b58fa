"""Greedy generation with a KV cache, and the masks of what was said.

Axis letters: B rows of a batch, T prompt bucket, N new-token bucket, D width of the language model, S `<SEG>` slots,
V vocabulary, M side of the mask decoder's output.

One jit does a whole answer: prefill, then a `lax.while_loop` that ends as soon as every row has. Rows are independent:
row b continues at its own length, in cache slots length_b, length_b + 1, …
"""

from __future__ import annotations

import json
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mimo_jax import pathtree
from mimo_jax.config import Config
from mimo_jax.errors import UserError
from mimo_jax.models import mimo, stack


class Generated(NamedTuple):
    """ids int32 [B, N] (0 after a row's end), probs fp32 [B, N] of the chosen tokens, lengths int32 [B] (the end token,
    if one came, not counted), ended bool [B] (an end token came), states [B, N, D]: what `segment` reads should token n
    be a `<SEG>`."""

    ids: jax.Array
    probs: jax.Array
    lengths: jax.Array
    ended: jax.Array
    states: jax.Array


def generate(
    model,
    x_q: jax.Array,
    input_ids: jax.Array,
    query_index: jax.Array,
    token_mask: jax.Array,
    limits: jax.Array,
    *,
    new_tokens: int,
    eos_id: int,
    seg_state: str,
) -> Generated:
    """Greedy answers to B prompts of different lengths.

    model: bound `models.mimo` module. x_q [B, R, Q, D]; input_ids, query_index int32 [B, T] and token_mask bool [B, T] as
    in a training batch, left-aligned, ending where the answer begins; limits int32 [B]: tokens that a row may get, at most
    `new_tokens` (0 for a row that is only padding). `seg_state`: "token" keeps the state *at* each new token, for which
    also the last allowed one is run through the model; "predict" the state that predicted it.
    """
    b, t = input_ids.shape
    lengths = token_mask.sum(axis=1).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    cache = model.new_cache(b, t + new_tokens)
    hidden, cache = model.decode(model.embed(input_ids, query_index, x_q), positions, cache)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)  # [B, 1, D]

    class Loop(NamedTuple):
        step: jax.Array
        last: jax.Array  # [B, 1, D], the state that predicts the next token
        cache: dict
        live: jax.Array  # bool [B]
        ended: jax.Array  # bool [B]
        taken: jax.Array  # int32 [B], tokens so far
        ids: jax.Array
        probs: jax.Array
        states: jax.Array

    def emit(loop: Loop) -> Loop:
        logits = model.logits(loop.last)[:, 0]  # [B, V]
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        prob = jnp.exp(jnp.max(logits, axis=-1) - jax.nn.logsumexp(logits, axis=-1))
        ended = loop.ended | (loop.live & (token == eos_id))
        live = loop.live & ~ended  # rows that take this token
        x = model.embed(token[:, None], jnp.full((b, 1), -1, jnp.int32), x_q)
        after, cache = model.decode(x, (lengths + loop.step)[:, None], loop.cache)
        state = after if seg_state == "token" else loop.last
        return Loop(
            step=loop.step + 1,
            last=after,
            cache=cache,
            live=live & (loop.step + 1 < limits),
            ended=ended,
            taken=loop.taken + live,
            ids=loop.ids.at[:, loop.step].set(jnp.where(live, token, 0)),
            probs=loop.probs.at[:, loop.step].set(jnp.where(live, prob, 0.0)),
            states=loop.states.at[:, loop.step].set(jnp.where(live[:, None], state[:, 0], 0)),
        )

    end = jax.lax.while_loop(
        lambda loop: (loop.step < new_tokens) & loop.live.any(),
        emit,
        Loop(
            step=jnp.int32(0),
            last=last,
            cache=cache,
            live=limits > 0,
            ended=jnp.zeros(b, bool),
            taken=jnp.zeros(b, jnp.int32),
            ids=jnp.zeros((b, new_tokens), jnp.int32),
            probs=jnp.zeros((b, new_tokens), jnp.float32),
            states=jnp.zeros((b, new_tokens, last.shape[-1]), last.dtype),
        ),
    )
    return Generated(end.ids, end.probs, end.taken, end.ended, end.states)


class Engine:
    """The jitted functions of one model; each compiles once per shape of its arguments, whatever the parameters."""

    def __init__(self, config: Config, params: dict, eos_id: int):
        """params: nested dict of all parameters, wherever they are placed. UserError if they are not those of the config."""
        _fit(config, params)
        self.params = jax.tree.map(jnp.asarray, params)
        self._encode, self._align, self._generate, self._segment = _functions(config.model_json(), eos_id)

    def encode(self, clip_image, clip_size, sam_image, sam_size) -> tuple[jax.Array, jax.Array]:
        """N images as in a batch -> X_img [N, I, Dc] and SAM's features [N, g, g, C]."""
        return self._encode(self.params, clip_image, clip_size, sam_image, sam_size)

    def align(self, x_img, instruction_ids, instruction_mask, prompt_xy, prompt_kind) -> jax.Array:
        """X_img [B, I, Dc] and the turns' own instructions and prompts [B, R, …] -> X_q [B, R, Q, D]."""
        return self._align(self.params, x_img, instruction_ids, instruction_mask, prompt_xy, prompt_kind)

    def generate(self, x_q, input_ids, query_index, token_mask, limits, new_tokens: int) -> Generated:
        """See `generate`."""
        return self._generate(self.params, x_q, input_ids, query_index, token_mask, limits, new_tokens=new_tokens)

    def segment(self, features, states, index) -> tuple[jax.Array, jax.Array]:
        """SAM's features [B, g, g, C], states [B, N, D] of `Generated`, index int32 [B, S] of each `<SEG>` among the new tokens
        (any value in an unused slot) -> mask logits fp32 [B, S, M, M], predicted IoU fp32 [B, S]."""
        return self._segment(self.params, features, states, index)


def _fit(config: Config, params: dict) -> None:
    """UserError that lists every parameter which the model lacks, does not know, or has in another shape."""
    wanted = {path: leaf.shape for path, leaf in pathtree.flatten(mimo.abstract(config)[1]).items()}
    given = {path: leaf.shape for path, leaf in pathtree.flatten(params).items()}
    wrong = sorted(path for path in wanted.keys() | given.keys() if wanted.get(path) != given.get(path))
    if wrong:
        shown = ", ".join(f"{path} ({given.get(path, 'missing')}, not {wanted.get(path, 'known')})" for path in wrong[:5])
        raise UserError(f"checkpoint: {len(wrong)} parameters do not fit its model config: {shown}; was the config changed?")


def compiler_options(config: Config) -> dict[str, str] | None:
    """What XLA is told. On a CPU it would hoist a float32 copy of all scanned bf16 weights out of the loop over the layers,
    twice the model beside it; kept inside, one layer is widened at a time."""
    if jax.default_backend() == "cpu" and config.model.frozen_dtype != "float32":
        return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    return None


@lru_cache(maxsize=4)
def _functions(model_json: str, eos_id: int):
    """Jitted (encode, align, generate, segment) of a model config, kept so that evaluations during training compile once."""
    config = Config.from_dict({"model": json.loads(model_json)})
    graphdef, _ = mimo.abstract(config)
    compiler = compiler_options(config)

    def jitted(function, **options):
        bound = lambda params, *args, **kwargs: function(stack.bind(graphdef, params), *args, **kwargs)  # noqa: E731
        return jax.jit(bound, compiler_options=compiler, **options)

    def encode(model, clip_image, clip_size, sam_image, sam_size):
        return model.encode_clip(clip_image, clip_size), model.encode_sam(sam_image, sam_size)

    def align(model, *args):
        return model.align(*args)

    def segment(model, features, states, index):
        return model.segment(features, jnp.take_along_axis(states, index[..., None], axis=1))

    run = partial(generate, eos_id=eos_id, seg_state=config.model.seg_state)
    return jitted(encode), jitted(align), jitted(run, static_argnames="new_tokens"), jitted(segment)
