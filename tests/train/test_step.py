"""The step: what moves, what stays, and that accumulation and bad batches do what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax import pathtree, sharding
from mimo_jax.config import ConfigError, MeshConfig, TrainConfig
from mimo_jax.model_config import LoraConfig
from mimo_jax.parameters import multipliers
from mimo_jax.train.optimizer import make_optimizer, schedule
from mimo_jax.train.state import TrainSetup
from mimo_jax.train.step import make_step
from tests.tiny_config import quick_config, random_batch, random_params, tiny_config

LORA_TABLE = {
    r"/lora_[ab]$": 1.0,
    r"/grounding$": 1.0,
    r"^(aligner|prompt|seg_projection)/": 1.0,
    r"^sam_decoder/": 0.5,
    r".": None,
}


def plan_for(config) -> TrainSetup:
    return TrainSetup(config, sharding.make_mesh(MeshConfig()))


def lora_config():
    config = tiny_config(lora=LoraConfig(rank=2, alpha=4.0, targets="q,v"))
    config.trainables = dict(LORA_TABLE)
    return config


def flat(tree) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in pathtree.flatten(tree).items()}


def test_a_lora_step_moves_what_the_table_names_and_nothing_else():
    config = lora_config()
    plan = plan_for(config)
    state, frozen = plan.start(random_params(config))
    before, base = flat(state["params"]), flat(frozen)
    assert not any("lora" in p or p.endswith("grounding") for p in base)
    step = make_step(plan)
    for seed in range(3):
        batch = random_batch(config, seed)
        batch["prompt_kind"][0] = 0  # one turn that points at nothing, for what is learnt of that
        state, metrics = step(state, frozen, batch)
    after = flat(state["params"])
    assert all(np.array_equal(value, flat(frozen)[path]) for path, value in base.items())
    still = [path for path, value in after.items() if np.array_equal(value, before[path])]
    # Only parameters that the loss does not reach stay: multimask heads, which single-mask training leaves out.
    assert all(path.startswith("sam_decoder/") for path in still), still
    assert float(metrics["finite"]) == 1.0 and int(state["step"]) == 3


def test_optimizer_slots_exist_for_trained_parameters_alone():
    plan = plan_for(lora_config())
    trained = {leaf.shape for leaf in jax.tree.leaves(plan.state["params"])}
    slots = [leaf for leaf in jax.tree.leaves(plan.state["opt"]) if leaf.ndim]
    assert {leaf.shape for leaf in slots} <= trained and all(leaf.dtype == jnp.float32 for leaf in slots)
    assert len(slots) == 2 * len(jax.tree.leaves(plan.state["params"]))


def test_frozen_parameters_take_the_frozen_dtype_and_trained_ones_stay_fp32():
    config = lora_config()
    config.model.frozen_dtype = "bfloat16"
    plan = plan_for(config)
    frozen = pathtree.flatten(plan.frozen)
    assert frozen.pop("sam_prompt/gaussian").dtype == jnp.float32  # never rounded
    assert {leaf.dtype for leaf in frozen.values()} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(plan.train)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_accumulated_micro_batches_equal_one_batch():
    """Samples carry unlike numbers of tokens and masks, so that dividing per micro-batch would show."""
    config = tiny_config()
    batch = random_batch(config)
    batch["loss_mask"][0, :36] = 0
    batch["seg_mask"][1:] = False
    batch["attention_target_mask"][-1] = False
    config.train.loss.attention_map = 1.0
    results = {}
    for micro in (1, 2):
        config.train = dataclasses.replace(config.train, grad_accum_steps=micro)
        plan = plan_for(config)
        state, frozen = plan.start(random_params(config))
        state, metrics = make_step(plan)(state, frozen, batch)
        results[micro] = metrics
    for name in ("loss", "ce", "bce", "dice", "iou", "attention_map", "grad_norm", "token_accuracy"):
        np.testing.assert_allclose(results[1][name], results[2][name], rtol=1e-4)


def lora_step(dropout: float, micro: int = 1):
    config = quick_config()
    config.model.lora = LoraConfig(rank=2, alpha=4.0, targets="q,v", dropout=dropout)
    config.trainables = dict(LORA_TABLE)
    config.train = dataclasses.replace(config.train, grad_accum_steps=micro)
    plan = plan_for(config)
    return plan, make_step(plan), random_batch(config)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_only_a_step_with_dropout_is_random(dropout):
    plan, step, batch = lora_step(dropout)
    assert ("random_bits" in str(step.trace(plan.state, plan.frozen, batch).jaxpr)) == bool(dropout)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [1, 2])
def test_dropout_depends_on_the_step_and_the_sample_alone(micro):
    """The loss of a step is the same again from the same state, so that a resumed run goes on as the first, and another at another step."""
    plan, step, batch = lora_step(0.3, micro)
    losses = []
    for number in (0, 0, 1):
        state, frozen = plan.start(random_params(plan.config))
        state["step"] = state["step"] + number
        losses.append(float(step(state, frozen, batch)[1]["loss"]))
    assert losses[0] == losses[1] != losses[2]


def test_a_step_that_is_not_finite_changes_nothing_and_says_so():
    config = tiny_config()
    plan = plan_for(config)
    params = random_params(config)
    poisoned = pathtree.flatten(params)
    poisoned["aligner/queries"][0, 0] = np.nan
    state, frozen = plan.start(pathtree.unflatten(poisoned))
    before = flat(state["params"])
    state, metrics = make_step(plan)(state, frozen, random_batch(config))
    assert float(metrics["finite"]) == 0.0 and int(state["step"]) == 0
    assert all(np.array_equal(value, before[path], equal_nan=True) for path, value in flat(state["params"]).items())


@pytest.mark.slow
def test_training_learns_a_batch_by_heart():
    config = tiny_config()
    config.train = TrainConfig(steps=60, learning_rate=1e-2, warmup_steps=5, eval_samples=0)
    plan = plan_for(config)
    state, frozen = plan.start(plan.initial_params(jax.random.key(0)))
    step, batch = make_step(plan), random_batch(config)
    losses = []
    for _ in range(60):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert step._cache_size() == 1


def test_schedule_warms_up_and_decays_to_the_end():
    rate = schedule(TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1))
    assert rate(0) == 0.0 and rate(5) == pytest.approx(0.5) and rate(10) == pytest.approx(1.0)
    assert rate(55) == pytest.approx(0.55) and rate(100) == pytest.approx(0.1)


def test_multipliers_scale_the_update():
    params = {"a": {"w": jnp.ones((2, 2))}, "b": {"w": jnp.ones((2, 2))}}
    optimizer = make_optimizer(TrainConfig(warmup_steps=0, learning_rate=0.1, max_grad_norm=100.0), {"a/w": 1.0, "b/w": 0.25})
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_allclose(updates["b"]["w"], updates["a"]["w"] * 0.25, rtol=1e-6)
    assert np.abs(updates["a"]["w"]).min() > 0.01


def test_a_parameter_without_a_row_and_a_table_that_freezes_all_are_errors():
    config = tiny_config()
    shapes = plan_for(config).params
    config.trainables = {r"^llm/": 1.0}
    with pytest.raises(ConfigError, match="no row matches parameter"):
        multipliers(config, shapes)
    config.trainables = {r".": None}
    with pytest.raises(ConfigError, match=r"^config\.trainables: freezes every parameter"):
        multipliers(config, shapes)


def test_freeze_stops_what_the_table_would_train():
    config = tiny_config()
    shapes = plan_for(config).params
    before = multipliers(config, shapes)
    config.freeze = r"^sam_decoder/"
    after = multipliers(config, shapes)
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {path for path in before if path.startswith("sam_decoder/")} and {after[path] for path in changed} == {None}
    config.freeze = "."
    with pytest.raises(ConfigError, match=r"^config\.freeze: freezes every parameter; match less"):
        multipliers(config, shapes)
