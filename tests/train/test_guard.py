"""Non-finite steps are skipped and counted, and too many of them stop the run; losses that are outliers are recorded."""

import json

import jax.numpy as jnp
import pytest

from mimo_jax.checkpoints.checkpoint import Checkpoints
from mimo_jax.config import TrainConfig
from mimo_jax.train.guard import NonFiniteGuard, NotFinite
from mimo_jax.train.hooks import StepInfo


def run(folder, losses, **settings) -> NonFiniteGuard:
    """The guard after steps with these losses."""
    guard = NonFiniteGuard(TrainConfig(**settings), Checkpoints(folder), lambda batch: [f"record {batch}"])
    for number, loss in enumerate(losses, 1):
        metrics = {"loss": jnp.float32(loss), "finite": jnp.float32(jnp.isfinite(loss))}
        guard(StepInfo(number, {}, metrics, 4, number == len(losses), lambda number=number: {"batch": number}))
    return guard


def spikes(folder) -> list[dict]:
    path = folder / "spikes.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_steps_that_are_not_finite_are_told_and_skipped(tmp_path, capsys):
    nan = float("nan")
    run(tmp_path, [1, nan, nan, 1, nan, nan, 1], max_skipped=2)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told] == ["step 2", "step 3", "step 5", "step 6"]
    assert "2 in a row, config.train.max_skipped allows 2" in told[1] and "1 in a row" in told[2]


@pytest.mark.parametrize("allowed", [0, 2])
def test_one_more_in_a_row_stops_the_run(tmp_path, allowed):
    with pytest.raises(NotFinite, match=f"not finite at step {allowed + 2}, .*no checkpoint was written yet; lower config.train.learning"):
        run(tmp_path, [1] + [float("inf")] * 9, max_skipped=allowed)


def test_a_loss_out_of_line_is_written_down_with_its_records(tmp_path):
    losses = [1 + 0.01 * (number % 5) for number in range(50)]
    losses[40] = 5.0
    losses[10] = 5.0  # too few before it to judge
    run(tmp_path, losses, spike_threshold=6.0)
    (row,) = spikes(tmp_path)
    assert row["step"] == 41 and row["loss"] == 5.0 and row["records"] == ["record 40"]
    assert row["loss"] > row["mean"] + 6 * row["deviation"]


def test_no_spikes_where_none_are_asked_for(tmp_path):
    run(tmp_path, [1.0] * 50 + [9.0], spike_threshold=0)
    assert spikes(tmp_path) == []
