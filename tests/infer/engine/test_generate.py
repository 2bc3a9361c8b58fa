"""Generation with a cache against the plain forward pass, run again for every token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.config import Config
from mimo_jax.infer.engine.compiled import Engine
from mimo_jax.infer.engine.generate import sample_token
from mimo_jax.models import mimo, scan
from tests.tiny_config import random_batch, random_params, tiny_config

NEW = 10
LENGTHS = np.array([40, 17, 29, 8])
IMAGES = ("vision_image", "vision_size", "sam_image", "sam_size")
PROMPTS = ("instruction_ids", "instruction_mask", "prompt_xy", "prompt_kind")


class Scene(NamedTuple):
    config: Config
    params: dict
    batch: dict
    features: jax.Array
    x_q: jax.Array
    engine: Engine


@pytest.fixture(scope="module", params=["token", "predict"])
def scene(request):
    """Four prompts of different lengths in one batch of 40 tokens, padded with ids that would change the answer if seen."""
    config = tiny_config(seg_state=request.param)
    params = random_params(config)
    engine = Engine(config, params, eos_id=-1)
    batch = random_batch(config, seed=2)
    batch["token_mask"] = np.arange(40) < LENGTHS[:, None]
    x_img, features = (jnp.repeat(f, 2, axis=0) for f in engine.encode({k: batch[k] for k in IMAGES}, 2))
    x_q = engine.align(x_img, *(batch[k] for k in PROMPTS))
    return Scene(config, params, batch, features, x_q, engine)


def run(scene, limits, rows=slice(None), new_tokens=NEW, engine=None, pieces=(NEW,), greed=None):
    """The state after the last piece, as numpy; pieces: where decoding is interrupted."""
    engine = engine or scene.engine
    ids, query_index, mask = (scene.batch[name][rows] for name in ("input_ids", "query_index", "token_mask"))
    b = len(ids)
    temperature, top_p, seed = greed or (np.zeros(b, np.float32), np.ones(b, np.float32), np.zeros(b, np.uint32))
    where = np.zeros(b, np.int32), mask.sum(axis=1).astype(np.int32)
    cache = engine.new_cache(b, 40 + new_tokens)
    state = engine.prefill(
        cache, scene.x_q[rows], ids, query_index, *where, np.asarray(limits, np.int32), temperature, top_p, seed, new_tokens
    )
    for until in pieces:
        state = engine.decode(state, until)
    return jax.tree.map(np.asarray, state)


def whole(scene, new_ids):
    """The batch with each row's answer [4, N] standing behind its prompt, as training would see it."""
    made = dict(scene.batch)
    for name, fill, new in (("input_ids", 0, new_ids), ("query_index", -1, np.full_like(new_ids, -1))):
        made[name] = np.full((4, 40 + new_ids.shape[1]), fill, np.int32)
        for b, n in enumerate(LENGTHS):
            made[name][b, : n + new_ids.shape[1]] = np.concatenate([scene.batch[name][b, :n], new[b]])
    return made


def forward(scene, batch):
    """The teacher-forced model, without a cache: its outputs and the logits of every position."""
    graphdef, _ = mimo.abstract(scene.config)

    @jax.jit
    def apply(params, batch):
        model = scan.bind(graphdef, params)
        out = model(batch)
        return out | {"logits": model.logits(out["hidden"])}

    return jax.tree.map(np.asarray, apply(scene.params, batch))


def test_cached_decoding_equals_the_uncached_forward(scene):
    """Each new token is the uncached model's best, and every state that a <SEG> there would hand on is the one that training
    would have read, that of the last allowed token included; so are the masks and the predicted IoU."""
    got = run(scene, [NEW] * 4)
    assert len(np.unique(got.ids)) > 5  # else equality would say little
    index = np.tile(np.array([0, 4, NEW - 1], np.int32), (4, 1))
    out = forward(scene, whole(scene, got.ids) | {"seg_index": index + LENGTHS[:, None]})
    for b, n in enumerate(LENGTHS):
        before = out["logits"][b, n - 1 : n + NEW - 1]
        np.testing.assert_array_equal(got.ids[b], before.argmax(axis=-1))
        np.testing.assert_allclose(got.probs[b], np.asarray(jax.nn.softmax(before)).max(axis=-1), rtol=1e-3)
        first = n if scene.config.model.seg_state == "token" else n - 1
        np.testing.assert_allclose(got.states[b], out["hidden"][b, first : first + NEW], rtol=2e-3, atol=2e-4)
    assert (got.num_generated == NEW).all() and not got.ended.any()

    logits, iou = scene.engine.segment(scene.features, got.states, index, 12)
    np.testing.assert_allclose(logits, out["masks"], rtol=1e-2, atol=1e-3)
    np.testing.assert_allclose(iou, out["iou"], rtol=1e-2, atol=1e-4)


def test_rows_do_not_feel_each_other(scene):
    together = run(scene, [NEW, 4, 0, NEW])
    for b, limit in enumerate([NEW, 4, 0, NEW]):
        alone = run(scene, [limit], rows=slice(b, b + 1))
        np.testing.assert_array_equal(together.ids[b], alone.ids[0])
        np.testing.assert_allclose(together.states[b], alone.states[0], rtol=2e-3, atol=2e-4)
        assert together.num_generated[b] == alone.num_generated[0] == limit
    assert not together.ids[2].any() and not together.states[1, 4:].any()


def test_a_limit_cuts_and_leaves_the_state_of_the_last_token(scene):
    """<SEG> may be the last token allowed: its state is that of a longer run."""
    long, short = run(scene, [NEW] * 4), run(scene, [3] * 4, new_tokens=3)
    np.testing.assert_array_equal(short.ids, long.ids[:, :3])
    np.testing.assert_allclose(short.states, long.states[:, :3], rtol=2e-3, atol=2e-4)
    assert np.abs(short.states[:, 2]).min(axis=1).all()


def test_the_end_token_ends_its_row_alone(scene):
    free = run(scene, [NEW] * 4)
    eos = int(free.ids[1, 4])
    got = run(scene, [NEW] * 4, engine=Engine(scene.config, scene.params, eos))
    for b in range(4):
        place = np.flatnonzero(free.ids[b] == eos)
        length = place[0] if len(place) else NEW
        assert got.num_generated[b] == length and got.ended[b] == bool(len(place))
        np.testing.assert_array_equal(got.ids[b, :length], free.ids[b, :length])
        assert not got.ids[b, length:].any() and not got.probs[b, length:].any()
    assert got.ended.any() and not got.ended.all()


def test_pieces_make_the_whole(scene):
    whole, pieces = run(scene, [NEW, 4, 0, NEW]), run(scene, [NEW, 4, 0, NEW], pieces=(1, 1, 5, NEW))
    for name in ("ids", "num_generated", "probs", "states", "active", "ended"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(pieces, name), err_msg=name)


def test_a_turn_behind_a_kept_cache_equals_the_whole_prompt(scene):
    """The first 8 tokens of every row in one call, the rest behind them in a larger cache: the same answer and the same cache."""
    whole = run(scene, [NEW] * 4)
    nobody = np.zeros(4, np.float32), np.ones(4, np.float32), np.zeros(4, np.uint32)
    parts = {name: scene.batch[name] for name in ("input_ids", "query_index")}
    first, zero, limits = np.full(4, 8, np.int32), np.zeros(4, np.int32), np.full(4, NEW, np.int32)
    state = scene.engine.prefill(
        scene.engine.new_cache(4, 32), scene.x_q, *(a[:, :8] for a in parts.values()), zero, first, limits, *nobody, NEW
    )
    before = scene.engine.counts["prefilled"]
    cache = scene.engine.extend(state.cache, 40 + NEW)
    state = scene.engine.prefill(
        cache, scene.x_q, *(a[:, 8:] for a in parts.values()), first, (LENGTHS - 8).astype(np.int32), limits, *nobody, NEW
    )
    assert scene.engine.counts["prefilled"] - before == LENGTHS.sum() - 4 * 8
    got = jax.tree.map(np.asarray, scene.engine.decode(state, NEW))
    rows = slice(0, 3)  # the last has no second part: its prompt ends where its first part does
    np.testing.assert_array_equal(got.ids[rows], whole.ids[rows])
    np.testing.assert_allclose(got.states[rows], whole.states[rows], rtol=2e-3, atol=2e-4)
    for b, n in enumerate(LENGTHS[rows]):
        np.testing.assert_allclose(got.cache["k"][:, b, :, : n + NEW], whole.cache["k"][:, b, :, : n + NEW], rtol=2e-3, atol=2e-4)


def test_drawn_rows_follow_their_seed_alone_and_greedy_ones_stay(scene):
    warm, top, seed = np.array([0.0, 1.5, 1.5, 1.5], np.float32), np.ones(4, np.float32), np.array([1, 2, 2, 3], np.uint32)
    greedy, mixed = run(scene, [NEW] * 4), run(scene, [NEW] * 4, greed=(warm, top, seed))
    np.testing.assert_array_equal(mixed.ids[0], greedy.ids[0])
    assert (mixed.ids[1:] != greedy.ids[1:]).any(axis=1).all()
    alone = run(scene, [NEW], rows=slice(1, 2), greed=(warm[1:2], top[1:2], seed[1:2]))
    np.testing.assert_array_equal(mixed.ids[1], alone.ids[0])
    np.testing.assert_array_equal(run(scene, [NEW] * 4, greed=(warm, top * 1e-6, seed)).ids, greedy.ids)


def test_draws_have_the_frequencies_of_the_nucleus():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    rows = 20000
    draw = jax.jit(
        lambda seed, top_p, t: sample_token(jnp.tile(logits, (rows, 1)), jnp.full(rows, t), jnp.full(rows, top_p), seed, jnp.int32(3))
    )
    for top_p, temperature, expected in (
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (0.8, 1.0, [0.625, 0.375, 0, 0]),
        (0.81, 1.0, [0.5263, 0.3158, 0.1579, 0]),
        (1.0, 0.5, [0.6849, 0.2466, 0.0616, 0.0068]),
    ):
        drawn = np.bincount(draw(np.arange(rows, dtype=np.uint32), top_p, temperature), minlength=4) / rows
        np.testing.assert_allclose(drawn, expected, atol=0.012)
