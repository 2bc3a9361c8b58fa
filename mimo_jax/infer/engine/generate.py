"""Answers token by token with a KV cache: prefill what is new, then decode until every row has ended.

Axis letters: B rows of a batch, T new tokens of the prompt (a bucket), S slots of the cache, M new-token bucket, D width of the
language model, V vocabulary, R turns, Q tokens of one turn's X_q.

Rows are independent: row b goes on at its own length, in cache slots filled_b, filled_b + 1, … A cache that is kept takes the
next turn behind what it holds, so that only that turn is prefilled.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Decoding(NamedTuple):
    """A batch under way. cache: {"k", "v"} [N, B, G, S, K]; prompt_len int32 [B]: slots that hold the prompt; last [B, 1, D]: the state
    that predicts the next token; step: tokens since the prompt; active bool [B]: rows that go on; ended bool [B]: an end token
    came; num_generated int32 [B]: tokens so far, the end token not counted; limits int32 [B]: tokens that a row may get. ids int32 [B, M]
    (0 after a row's end), probs fp32 [B, M] of the chosen tokens under the unscaled distribution, states [B, M, D]: what the
    mask decoder reads should token m be a `<SEG>`. temperature, top_p fp32 [B], seed uint32 [B]: see `choose`."""

    cache: dict[str, jax.Array]
    prompt_len: jax.Array
    last: jax.Array
    step: jax.Array
    active: jax.Array
    ended: jax.Array
    num_generated: jax.Array
    limits: jax.Array
    ids: jax.Array
    probs: jax.Array
    states: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    seed: jax.Array


def prefill(
    model, cache: dict, x: jax.Array, start: jax.Array, lengths: jax.Array, limits: jax.Array, temperature, top_p, seed, *, new_tokens: int
) -> Decoding:
    """Run the new part of each row's prompt.

    model: bound `models.mimo` module. x [B, T, D]: embedded tokens of which row b has lengths[b], left-aligned; they go to the slots
    from start[b] on, behind what the cache holds already. limits int32 [B]: at most `new_tokens` = M (0: a row that is padding)."""
    b, t, _ = x.shape
    hidden, cache = model.decode(x, start[:, None] + jnp.arange(t, dtype=jnp.int32), cache)
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)
    return Decoding(
        cache=cache,
        prompt_len=start + lengths,
        last=last,
        step=jnp.int32(0),
        active=limits > 0,
        ended=jnp.zeros(b, bool),
        num_generated=jnp.zeros(b, jnp.int32),
        limits=limits,
        ids=jnp.zeros((b, new_tokens), jnp.int32),
        probs=jnp.zeros((b, new_tokens), jnp.float32),
        states=jnp.zeros((b, new_tokens, last.shape[-1]), last.dtype),
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )


def decode(model, state: Decoding, until: jax.Array, *, eos_id: int, seg_state: str) -> Decoding:
    """Go on until `until` tokens after the prompt, or until no row is live.

    `seg_state`: "token" keeps the state *at* each new token; "predict" the state that predicted it. Every token taken is run through
    the model, also the last one allowed, so that the cache holds all that was said, and the end token where one came."""

    def emit(s: Decoding) -> Decoding:
        logits = model.logits(s.last)[:, 0]
        token = sample_token(logits, s.temperature, s.top_p, s.seed, s.step)
        prob = jnp.exp(jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1))
        ended = s.ended | (s.active & (token == eos_id))
        live = s.active & ~ended  # rows that take this token
        after, cache = model.decode(model.embedding(token[:, None]), (s.prompt_len + s.step)[:, None], s.cache)
        kept = after if seg_state == "token" else s.last
        return s._replace(
            cache=cache,
            last=after,
            step=s.step + 1,
            active=live & (s.step + 1 < s.limits),
            ended=ended,
            num_generated=s.num_generated + live,
            ids=s.ids.at[:, s.step].set(jnp.where(live, token, 0)),
            probs=s.probs.at[:, s.step].set(jnp.where(live, prob, 0.0)),
            states=s.states.at[:, s.step].set(jnp.where(live[:, None], kept[:, 0], 0)),
        )

    return jax.lax.while_loop(lambda s: (s.step < until) & s.active.any(), emit, state)


def sample_token(logits: jax.Array, temperature: jax.Array, top_p: jax.Array, seed: jax.Array, step: jax.Array) -> jax.Array:
    """The next token int32 [B] of logits fp32 [B, V]: the likeliest where temperature is 0; else drawn from softmax(logits /
    temperature), of the fewest likeliest tokens whose probabilities reach top_p. A row's draws depend on its own seed and on
    `step` alone, not on what else is in the batch."""
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn(logits: jax.Array) -> jax.Array:
        scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
        probs = jax.nn.softmax(scaled, axis=-1)
        ordered = jnp.sort(probs, axis=-1, descending=True)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        least = jnp.min(jnp.where(before < top_p[:, None], ordered, 1.0), axis=-1, keepdims=True)
        noise = jax.vmap(lambda s: jax.random.gumbel(jax.random.fold_in(jax.random.key(s), step), logits.shape[1:]))(seed)
        return jnp.argmax(jnp.where(probs >= least, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)

    # Most answers are greedy: sorting the vocabulary at every token is left to the batches that need it.
    sampled = jax.lax.cond((temperature > 0).any(), drawn, lambda _: likeliest, logits)
    return jnp.where(temperature > 0, sampled, likeliest)
