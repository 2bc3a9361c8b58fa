"""Prompts of several kinds: each mark is true, they fit, and their shares are those that are asked for."""

import numpy as np
import pytest

from mimo_jax.config import PROMPT_KINDS
from mimo_jax.data.loading.collate import sample_prompts
from mimo_jax.geometry import validate_boxes
from mimo_jax.model_config import PromptConfig

LIVER, SPLEEN = np.zeros((2, 60, 80), bool)
LIVER[10:40, 5:35] = SPLEEN[20:45, 50:70] = True
DRAWS = 600


def draws(masks, mixed, cfg=None, kinds=PROMPT_KINDS):
    return [sample_prompts(masks, np.random.default_rng(seed), cfg or PromptConfig(), kinds=kinds, mixed=mixed) for seed in range(DRAWS)]


def key(prompts) -> tuple:
    return prompts.points.tobytes(), prompts.boxes.tobytes(), *(scribble.tobytes() for scribble in prompts.scribbles)


def test_without_a_share_prompts_are_of_one_kind_and_with_one_the_others_stay():
    plain, mixed = draws([LIVER], 0.0), draws([LIVER], 0.3)
    assert all(len(prompts.kinds()) == 1 for prompts in plain)
    unchanged = sum(key(a) == key(b) for a, b in zip(plain, mixed, strict=True))
    assert unchanged / DRAWS == pytest.approx(0.7, abs=0.05)
    assert [key(prompts) for prompts in mixed] == [key(prompts) for prompts in draws([LIVER], 0.3)]


def test_mixed_prompts_have_every_pair_of_kinds_and_points_near_and_far():
    drawn = draws([LIVER], 1.0)
    inside = [prompts.kinds() - ({"point"} if not (prompts.points[:, 2] == 1).any() else set()) for prompts in drawn]
    for pair in ({"point", "box"}, {"point", "scribble"}, {"box", "scribble"}):
        assert sum(kinds == pair for kinds in inside) > 0.1 * DRAWS
    outside = [prompts.points[prompts.points[:, 2] == 0] for prompts in drawn]
    assert sum(bool(len(points)) for points in outside) > 0.6 * DRAWS
    x = np.concatenate(outside)[:, 0]
    assert (x < 45).mean() > 0.4 and (x > 55).mean() > 0.15
    boxed = [points for points, prompts in zip(outside, drawn, strict=True) if len(prompts.boxes)]
    assert sum(bool(len(points)) for points in boxed) > 0.4 * len(boxed)


@pytest.mark.parametrize("masks", [[LIVER], [LIVER, SPLEEN], [SPLEEN] * 4])
@pytest.mark.parametrize("tokens, scribble", [(8, 4), (12, 4), (16, 8), (64, 8)])
def test_every_mark_is_true_and_all_fit(masks, tokens, scribble):
    cfg, meant = PromptConfig(max_tokens=tokens, scribble_points=scribble), np.logical_or.reduce(masks)
    for prompts in draws(masks, 1.0, cfg):
        assert prompts.tokens(cfg) <= tokens
        x, y = prompts.points[:, :2].astype(int).T
        np.testing.assert_array_equal(meant[y, x], prompts.points[:, 2] == 1)
        assert all(meant[line[:, 1].astype(int), line[:, 0].astype(int)].any() for line in prompts.scribbles)
        validate_boxes(prompts.boxes, *meant.shape)
        assert (prompts.points[:, 2] == 1).any() or len(prompts.boxes) or prompts.scribbles


def test_only_kinds_that_are_configured_are_mixed():
    assert all(prompts.kinds() == {"box"} for prompts in draws([LIVER], 1.0, kinds=("box",)))
    assert {frozenset(p.kinds()) for p in draws([LIVER], 1.0, kinds=("box", "scribble"))} == {
        frozenset(kinds) for kinds in (["box"], ["scribble"], ["box", "scribble"])
    }
