"""From a checkpoint and a split to a calibration beside the step, and into the next answers."""

import math

import numpy as np
import pytest

from checkpoints_convert.export import export_checkpoint
from mimo_jax import pathtree
from mimo_jax.checkpoints import checkpoint
from mimo_jax.config import Config, SourceConfig
from mimo_jax.data.loading.sources import open_source
from mimo_jax.data.records import write_records
from mimo_jax.errors import UserError
from mimo_jax.eval import calibrate as cal
from mimo_jax.eval.evaluate import collect_results, evaluate_checkpoint, evaluate_params
from mimo_jax.eval.selection import select_samples
from mimo_jax.eval.standard_metrics import GROUNDED
from mimo_jax.infer.answers.calibration import UNCALIBRATED, Calibration, CalibrationError
from mimo_jax.infer.predictor import Mimo
from tests.data import handmade
from tests.tiny_config import painting_params, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run that paints, and 14 images of val, one of test and one of train."""
    folder = tmp_path_factory.mktemp("calibrate")
    records = [handmade.record(i, "val") for i in range(14)] + [handmade.record(14, "test"), handmade.record(15, "train")]
    write_records(folder / "data", records, {"name": "handmade"})
    config = tiny_config()
    checkpoint.open_run(folder / "run", config)
    handmade.tokenizer(folder / "run")
    frozen, train = pathtree.partition(painting_params(config), lambda path: path.startswith("vision/"))
    checkpoint.start_run(folder / "run", config, frozen)
    steps = checkpoint.Checkpoints(folder / "run")
    for step in (1, 2):
        steps.save(step, {"params": train}, {})
    steps.wait()
    return folder


def test_from_a_checkpoint_to_calibrated_answers(folder, tmp_path, capsys):
    run = folder / "run"
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    before = Mimo.load(run).open(pixels).ask("Segment the liver.")
    assert before.entities and before.to_json()["calibrated"] is False
    one = before.entities[0]
    assert one.score == one.evidence.iou * one.evidence.seg_prob

    made = cal.calibrate_checkpoint(run, folder / "data", "val")
    path = run / "steps" / "2" / "calibration.json"
    assert str(path) in capsys.readouterr().out and Calibration.read(path) == made
    assert made.fitted["split"] == "val" and made.fitted["samples"] == 14 * 8 and made.fitted["entities"] >= 14 * 8
    mimo = Mimo.load(run)  # the step is as whole as it was
    after = mimo.open(pixels).ask("Segment the liver.")
    assert mimo.calibration == made and after.to_json()["calibrated"] is True
    assert [e.score for e in after.entities] == pytest.approx(made.scores([e.evidence for e in after.entities]))
    assert all(e.uncertain == (e.score < made.uncertain_below or e.box_xyxy is None) for e in after.entities)
    assert not Mimo.load(run / "steps" / "1").calibration, "it belongs to one step"
    assert before.understood is None and after.understood is True and mimo.familiarity.words
    assert len(mimo.familiarity.images) == 0, "one training image is too few to compare images with"
    strange = mimo.open(pixels).ask("Segment the unicorn.")
    assert strange.understood is False and strange.unanswered == ["unicorn"] and strange.likeness.words == ("unicorn",)

    report = evaluate_checkpoint(run, folder / "data", "test", tmp_path / "report.json")
    assert report["score"]["calibrated"] and report["score"]["fitted"] == made.fitted
    assert report["score"]["n"] >= 8 and "spearman" in capsys.readouterr().out

    export_checkpoint(run, "mimo", tmp_path / "whole")
    assert Mimo.load(tmp_path / "whole").calibration == made
    assert Mimo.load(tmp_path / "whole").familiarity.words == mimo.familiarity.words
    (tmp_path / "whole" / "steps" / "2" / "calibration.json").write_text("{")
    with pytest.raises(CalibrationError, match="is damaged"):
        Mimo.load(tmp_path / "whole")


def test_it_goes_with_its_step(folder, tmp_path):
    config = tiny_config()
    checkpoint.open_run(tmp_path, config)
    checkpoint.start_run(tmp_path, config, {})
    steps = checkpoint.Checkpoints(tmp_path, keep_last=1)
    for step in (1, 2, 2):  # the last one replaces the one before it
        steps.save(step, {"params": {"a": np.ones(2)}}, {})
        steps.wait()
        path = checkpoint.calibration_path(tmp_path, step)
        assert not path.exists()
        path.write_text("{}")
    assert not checkpoint.calibration_path(tmp_path, 1).exists()


def test_too_little_to_fit_on_is_said_before_anything_is_asked(folder):
    path = folder / "run" / "steps" / "1" / "calibration.json"
    with pytest.raises(CalibrationError, match="split test has 9 annotated structures.*100"):
        cal.calibrate_checkpoint(folder / "run" / "steps" / "1", folder / "data", "test")
    with pytest.raises(CalibrationError, match="split val has"):
        cal.calibrate_checkpoint(folder / "run" / "steps" / "1", folder / "data", "val", limit=20)
    assert not path.exists()


def test_at_the_end_of_training_it_reads_the_runs_own_sources(folder, capsys):
    mimo = Mimo.load(folder / "run")
    config = Config.from_dict(mimo.config.to_dict())
    config.data.sources = {"a": SourceConfig(str(folder / "data"))}
    config.train.calibrate_samples = 100
    config.data.weights = {"I": 1.0, "II": 1.0, "III": 1.0, "IV": 1.0}
    made = cal.calibrate_params(config, mimo.engine.params, mimo.tokenizer)
    assert made and made.fitted["samples"] == 100
    config.train.calibrate_samples = 10
    assert cal.calibrate_params(config, mimo.engine.params, mimo.tokenizer) is UNCALIBRATED
    assert "not calibrated" in capsys.readouterr().err


def test_a_run_is_evaluated_on_other_patients_than_its_scores_are_calibrated_on(folder, capsys):
    """The fit is that of the other patients' masks alone, and Brier and ECE of the report are those of the evaluated ones, by hand."""
    mimo = Mimo.load(folder / "run")
    config = Config.from_dict(mimo.config.to_dict())
    config.data.sources, config.data.weights = {"a": SourceConfig(str(folder / "data"))}, dict.fromkeys(GROUNDED, 1.0)
    config.train.calibrate_samples, config.train.eval_samples = 1000, 4
    made = cal.calibrate_params(config, mimo.engine.params, mimo.tokenizer)
    report = evaluate_params(config, mimo.engine.params, mimo.tokenizer, limit=4, calibration=made)
    assert made.fitted["in_sample"] is report["score"]["in_sample"] is False

    records = list(open_source(folder / "data", "val"))
    evaluated = select_samples(records, 4, GROUNDED)
    others = [record for record in records if record.group not in {records[i].group for i in evaluated}]
    assert 0 < len(others) == len(records) - len(evaluated)
    assert made.fitted["samples"] == sum(sample.perspective in GROUNDED for record in others for sample in record.samples)
    known = collect_results(mimo, others, select_samples(others, None, GROUNDED)).segmented
    fit = Calibration.fit(known, {})
    assert made.fitted["entities"] == len(known) and made.fitted["mean_iou"] == pytest.approx(np.mean([iou for _, iou in known]))
    for name in ("weights", "places", "expected", "uncertain_below"):
        np.testing.assert_allclose(getattr(made, name), getattr(fit, name), rtol=1e-6, atol=1e-9)

    scores, right = [], []
    for evidence, iou in collect_results(mimo, records, evaluated).segmented:
        clipped = (min(max(value, 0.01), 0.99) for value in (evidence.iou, evidence.seg_prob, evidence.word_prob, evidence.pixel_iou))
        total = sum(weight * math.log(p / (1 - p)) for weight, p in zip(made.weights, clipped, strict=True))
        scores.append(float(np.interp(total, made.places, made.expected)))
        right.append(float(iou >= 0.5))
    assert report["score"]["n"] == len(scores)
    assert report["score"]["calibrated"]["brier"] == pytest.approx(
        np.mean((np.array(scores) - right) ** 2), abs=1e-4
    )  # rounded in the report

    config.train.eval_samples = 1000  # every patient is evaluated
    both = cal.calibrate_params(config, mimo.engine.params, mimo.tokenizer)
    assert both.fitted["in_sample"] is True and both.fitted["samples"] > made.fitted["samples"]
    assert "scores are calibrated on patients or cases that the run's evaluation also has" in capsys.readouterr().err


def test_a_folder_that_may_not_be_written_is_said_first(folder, monkeypatch):
    monkeypatch.setattr(cal.os, "access", lambda *_: False)
    with pytest.raises(UserError, match="calibration.json: no permission to write"):
        cal.calibrate_checkpoint(folder / "run", folder / "data", "val")
