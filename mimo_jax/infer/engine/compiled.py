"""The compiled functions of one model, with counts of their calls. The model itself is imported, and traced, only for a program that
is not in the program cache.

Axis letters: N images, B rows of a batch, T new tokens of the prompt, M new-token bucket, S `<SEG>` slots, R turns, P points or prompt
tokens of a turn, Q tokens of one turn's X_q, I image tokens, D width of the language model, Dc width of the vision tower, m side of the
mask decoder's output.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from mimo_jax import pathtree, sharding
from mimo_jax.config import Config
from mimo_jax.errors import UserError
from mimo_jax.infer.engine import generate
from mimo_jax.infer.engine.generate import Decoding
from mimo_jax.infer.engine.program_cache import ProgramCache

if TYPE_CHECKING:
    from mimo_jax.models.mimo import Features


class Functions(NamedTuple):
    """Jitted functions of a model config; each compiles once per shape of its arguments, independently of the parameters' values."""

    encode: jax.stages.Wrapped
    align: jax.stages.Wrapped
    splice: jax.stages.Wrapped
    new_cache: jax.stages.Wrapped
    extend: jax.stages.Wrapped
    prefill: jax.stages.Wrapped
    decode: jax.stages.Wrapped
    segment: jax.stages.Wrapped


class Engine:
    """The functions of one model with its parameters. counts: number of "images" encoded, tokens "prefilled" and "masks" decoded,
    without padding."""

    def __init__(self, config: Config, params: dict, eos_id: int):
        """params: nested dict of all parameters, with any sharding. Raises UserError if they do not fit the config."""
        self.params = jax.tree.map(jnp.asarray, params)
        self._programs = ProgramCache.of(config, self.params, eos_id)
        self._functions = lambda: functions(config.model_json(), eos_id, cache_sharding(config, self.params))
        if self._programs is None or not self._programs.is_known():
            _check_params(config, params)
        self.counts: Counter[str] = Counter()

    def _call(self, name: str, *args: Any, **static: Any) -> Any:
        """Call a function of `Functions`; `static` are its static arguments."""
        if self._programs is None:
            return getattr(self._functions(), name)(self.params, *args, **static)
        return self._programs.call(name, lambda: getattr(self._functions(), name), self.params, *args, **static)

    def encode(self, views: dict[str, Any], count: int) -> tuple[jax.Array, Features]:
        """Views of N images, the arrays of `data.transforms.preprocess`, of which `count` are not padding -> X_img [N, I, Dc] and SAM's
        features."""
        self.counts["images"] += count
        return self._call("encode", views)

    def align(self, x_img, instruction_ids, instruction_mask, prompt_xy, prompt_kind) -> jax.Array:
        """X_img [B, I, Dc] and the instructions and prompts of each turn [B, R, …] -> X_q [B, R, Q, D]."""
        return self._call("align", x_img, instruction_ids, instruction_mask, prompt_xy, prompt_kind)

    def new_cache(self, rows: int, slots: int) -> Any:
        """An empty cache of the language model, in the form that its kind defines."""
        return self._call("new_cache", rows=rows, slots=slots)

    def extend(self, cache: Any, slots: int) -> Any:
        """The same cache with room for `slots` tokens."""
        return self._call("extend", cache, slots=slots)

    def prefill(self, cache, x_q, input_ids, query_index, start, lengths, limits, temperature, top_p, seed, new_tokens: int) -> Decoding:
        """See `generate.prefill`. x_q [B, R, Q, D]; input_ids, query_index int32 [B, T] as in a training batch. The cache is donated."""
        self.counts["prefilled"] += int(np.sum(lengths * (limits > 0)))
        x = self._call("splice", input_ids, query_index, x_q)
        return self._call("prefill", cache, x, start, lengths, limits, temperature, top_p, seed, new_tokens=new_tokens)

    def decode(self, state: Decoding, until: int) -> Decoding:
        """See `generate.decode`. `state` is donated."""
        return self._call("decode", state, np.int32(until))

    def segment(self, features, states, index, count: int, points=None, refine: bool = False) -> tuple[jax.Array, jax.Array]:
        """SAM's features of B images, states [B, M, D] of `Decoding`, index int32 [B, S] of each `<SEG>` among the new tokens
        (`count` slots are used, the others may have any value) -> mask logits fp32 [B, S, m, m], predicted IoU fp32 [B, S].

        points: (xy [B, P, 2], labels int32 [B, P]) of each row's turn, as `prompts.sam_points` returns them; refine: decode again with
        the masks as dense prompts."""
        self.counts["masks"] += count
        return self._call("segment", features, states, index, points, refine=refine)


def _check_params(config: Config, params: dict) -> None:
    """Raise a UserError that lists parameters which are missing, unknown, or of another shape than in the model."""
    from mimo_jax.models import mimo

    expected = {path: leaf.shape for path, leaf in pathtree.flatten(mimo.abstract(config)[1]).items()}
    given = {path: leaf.shape for path, leaf in pathtree.flatten(params).items()}
    wrong = sorted(path for path in expected.keys() | given.keys() if expected.get(path) != given.get(path))
    if wrong:
        shown = ", ".join(f"{path} ({given.get(path, 'missing')}, not {expected.get(path, 'known')})" for path in wrong[:5])
        raise UserError(f"checkpoint: {len(wrong)} parameters do not fit its model config: {shown}; use the config of its training")


def cache_sharding(config: Config, params: dict) -> NamedSharding | None:
    """The sharding of a cache of the language model: split over its heads like the parameters (arrays, or shapes with their shardings);
    None for one device."""
    place = jax.tree.leaves(params)[0].sharding
    if not isinstance(place, NamedSharding):
        return None
    from mimo_jax.models import mimo, scan

    llm = scan.bind(mimo.abstract(config)[0], params).llm
    return sharding.cache_sharding(place.mesh, config.model.llm, llm.cache_axes())


def compiler_options(config: Config) -> dict[str, str] | None:
    """Options for XLA. On a CPU it would hoist a float32 copy of all scanned bf16 weights out of the loop over the layers, which needs
    twice the model's memory in addition; without that pass, one layer is converted at a time."""
    if jax.default_backend() == "cpu" and config.model.frozen_dtype != "float32":
        return {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
    return None


@lru_cache(maxsize=4)
def functions(model_json: str, eos_id: int, cache_sharding: NamedSharding | None = None) -> Functions:
    """The functions of a model config, cached so that evaluations during training compile once."""
    from mimo_jax.models import mimo, scan

    config = Config.from_dict({"model": json.loads(model_json)})
    graphdef, _ = mimo.abstract(config)
    compiler = compiler_options(config)

    def jitted(function, **options):
        bound = lambda params, *args, **kwargs: function(scan.bind(graphdef, params), *args, **kwargs)  # noqa: E731
        return jax.jit(bound, compiler_options=compiler, **options)

    def segment(model, features, states, index, points, refine):
        states = jnp.take_along_axis(states, index[..., None], axis=1)
        masks, iou = model.segment(features, states, points)
        return model.segment(features, states, points, masks) if refine else (masks, iou)

    decode = partial(generate.decode, eos_id=eos_id, seg_state=config.model.seg_state)
    return Functions(
        encode=jitted(lambda model, views: model.encode(views)),
        align=jitted(lambda model, *args: model.align(*args)),
        splice=jitted(lambda model, *args: model.embed(*args)),
        new_cache=jitted(
            lambda model, rows, slots: model.new_cache(rows, slots), static_argnames=("rows", "slots"), out_shardings=cache_sharding
        ),
        extend=jitted(lambda model, cache, slots: model.llm.extend_cache(cache, slots), static_argnames="slots"),
        prefill=jitted(generate.prefill, static_argnames="new_tokens", donate_argnums=1),
        decode=jitted(decode, donate_argnums=1),
        segment=jitted(segment, static_argnames="refine"),
    )
