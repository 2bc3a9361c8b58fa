"""Autoregressive generation with a KV cache: prefill the new tokens, then decode until every row has ended.

Axis letters: B rows of a batch, T new tokens of the prompt (a bucket), S slots of the cache, M new-token bucket, D width of the
language model, V vocabulary, R turns, Q tokens of one turn's X_q.

Rows are independent: row b writes its new tokens to the cache slots prompt_len_b, prompt_len_b + 1, … A cache that is kept for the
next turn is extended, so that only the new turn is prefilled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Decoding(NamedTuple):
    """The state of a batch between decoding steps.

    cache: of the language model, in the form of its kind; prompt_len int32 [B]: number of slots that hold the prompt; last [B, 1, D]:
    hidden state that predicts the next token; step: number of tokens since the prompt; active bool [B]: rows that are still generating;
    ended bool [B]: rows that produced the end token; num_generated int32 [B]: number of tokens so far, without the end token; limits
    int32 [B]: maximum number of tokens per row; ids int32 [B, M] (0 after a row's end); probs fp32 [B, M]: probabilities of the sampled
    tokens under the unscaled distribution; states [B, M, D]: input of the mask decoder if token m is a `<SEG>`; temperature, top_p fp32
    [B], seed uint32 [B]: see `sample_token`."""

    cache: Any
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
    model, cache: Any, x: jax.Array, start: jax.Array, lengths: jax.Array, limits: jax.Array, temperature, top_p, seed, *, new_tokens: int
) -> Decoding:
    """Run the model on the new part of each row's prompt.

    model: bound `models.mimo` module. x [B, T, D]: embedded tokens, left-aligned, of which row b has lengths[b]; they are written to the
    cache slots from start[b] on, after the tokens that the cache already holds. limits int32 [B]: maximum number of new tokens per row,
    at most `new_tokens` = M (0 for a padding row)."""
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
    """Decode until `until` tokens after the prompt, or until no row is active.

    seg_state: "token" stores the hidden state *at* each new token; "predict" the state that predicted it. Every generated token is run
    through the model, also the last one allowed, so that the cache holds the full answer including its end token."""

    def step(s: Decoding) -> Decoding:
        logits = model.logits(s.last)[:, 0]
        token = sample_token(logits, s.temperature, s.top_p, s.seed, s.step)
        prob = jnp.exp(jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1))
        ended = s.ended | (s.active & (token == eos_id))
        generating = s.active & ~ended  # rows that append this token
        after, cache = model.decode(model.embedding(token[:, None]), (s.prompt_len + s.step)[:, None], s.cache)
        seg_hidden = after if seg_state == "token" else s.last
        return s._replace(
            cache=cache,
            last=after,
            step=s.step + 1,
            active=generating & (s.step + 1 < s.limits),
            ended=ended,
            num_generated=s.num_generated + generating,
            ids=s.ids.at[:, s.step].set(jnp.where(generating, token, 0)),
            probs=s.probs.at[:, s.step].set(jnp.where(generating, prob, 0.0)),
            states=s.states.at[:, s.step].set(jnp.where(generating[:, None], seg_hidden[:, 0], 0)),
        )

    return jax.lax.while_loop(lambda s: (s.step < until) & s.active.any(), step, state)


def sample_token(logits: jax.Array, temperature: jax.Array, top_p: jax.Array, seed: jax.Array, step: jax.Array) -> jax.Array:
    """Sample the next token, int32 [B], from logits fp32 [B, V]: the argmax if temperature is 0; otherwise from softmax(logits /
    temperature), restricted to the smallest set of most probable tokens whose probabilities sum to top_p. A row's samples depend only on
    its seed and on `step`, not on what else is in the batch."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sample(logits: jax.Array) -> jax.Array:
        scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
        probs = jax.nn.softmax(scaled, axis=-1)
        ordered = jnp.sort(probs, axis=-1, descending=True)
        before = jnp.cumsum(ordered, axis=-1) - ordered
        minimum = jnp.min(jnp.where(before < top_p[:, None], ordered, 1.0), axis=-1, keepdims=True)
        noise = jax.vmap(lambda s: jax.random.gumbel(jax.random.fold_in(jax.random.key(s), step), logits.shape[1:]))(seed)
        return jnp.argmax(jnp.where(probs >= minimum, scaled + noise, -jnp.inf), axis=-1).astype(jnp.int32)

    # Most answers are greedy: only batches that sample sort the vocabulary at every token.
    sampled = jax.lax.cond((temperature > 0).any(), sample, lambda _: greedy, logits)
    return jnp.where(temperature > 0, sampled, greedy)
