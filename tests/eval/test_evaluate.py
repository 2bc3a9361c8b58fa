"""Scoring with an oracle that knows the truth, or part of it; and the whole way with a small random model."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mimo_jax import pathtree
from mimo_jax.checkpoints import checkpoint
from mimo_jax.config import Config, SourceConfig
from mimo_jax.data.records import RecordFolder, write_records
from mimo_jax.data.schema import Sample, Target, Turn
from mimo_jax.errors import UserError
from mimo_jax.eval import evaluate as ev
from mimo_jax.eval.accumulator import ground_truths
from mimo_jax.eval.compare import compare_reports
from mimo_jax.eval.registry import METRICS, Ratio, register_metric
from mimo_jax.eval.report import table
from mimo_jax.eval.selection import select_samples
from mimo_jax.infer.answers.answer import Answer, Entity
from mimo_jax.infer.answers.calibration import UNCALIBRATED, Calibration, ConfidenceFeatures
from mimo_jax.infer.predictor import Mimo, TurnHistory
from tests.data import handmade
from tests.tiny_config import random_params, tiny_config


def record(number=0, split="test"):
    """The handmade record, each sample with a question of its own, and samples of absence, closed VQA and two turns."""
    made = handmade.record(number, split)
    spleen = [m for m in made.masks if m.mask_id == "s"]
    more = [
        Sample("a", "I", [Turn("user", "Segment the kidney."), Turn("assistant", "There is no kidney in this image.")],
               [Target(1, "kidney", absent=True)], kind="absent"),
        Sample("y", "vqa", [Turn("user", "Is there a liver?"), Turn("assistant", "Yes.")], answer_type="closed",
               references=["Yes"], choices=["Yes", "No"], kind="yes_no"),
        Sample("n", "vqa", [Turn("user", "How many cysts?"), Turn("assistant", "Four.")], answer_type="closed",
               references=["Four", "4"], choices=["One", "Two"], kind="count"),
        Sample("t", "III", [Turn("user", "Show it."), Turn("assistant", "The liver is outlined."), Turn("user", "And what else?", ["s"]),
                            Turn("assistant", "The spleen.")],
               [Target(1, "liver", [4, 9], ["l"]), Target(3, "spleen", [4, 10], [m.mask_id for m in spleen])]),
    ]  # fmt: skip
    made.samples = [dataclasses.replace(s, sample_id=f"{made.id}/{i}", turns=[Turn(*dataclasses.astuple(t)) for t in s.turns])
                    for i, s in enumerate([*made.samples[:2], *made.samples[4:8], *more])]  # fmt: skip
    for i, sample in enumerate(made.samples):
        for turn in sample.turns[::2]:
            turn.text = f"{turn.text} ({i})"
    return made


@pytest.fixture(scope="module")
def mimo(tmp_path_factory):
    config = tiny_config(max_turns=2)
    return Mimo(config, random_params(config), handmade.tokenizer(tmp_path_factory.mktemp("tokenizer")))


SURE = ConfidenceFeatures(0.9, 0.9, 0.9, 0.9)


class Oracle:
    """Answers as `say(record, sample, turn, request)` wants: (text, [(phrase, mask)])."""

    def __init__(self, records, say):
        self.config = tiny_config(max_turns=2)
        self.by_question = {(r.id, t.text): (r, s, n) for r in records for s in r.samples for n, t in enumerate(s.turns)}
        self.by_pixels = {ev.record_image(r).tobytes(): r.id for r in records}
        self.say, self.requests, self.calibration = say, [], UNCALIBRATED

    def encode(self, images):
        return list(images)

    def check(self, request):
        pass

    def generate(self, requests):
        self.requests += requests
        made = []
        for request in requests:
            name = self.by_pixels.get(request.image.tobytes(), "image000")
            known, sample, turn = self.by_question[name, request.question]
            assert len(request.past) == turn // 2
            text, named = self.say(known, sample, turn + 1, request)
            entities = [Entity.of(i, phrase, mask, SURE) for i, (phrase, mask) in enumerate(named)]
            answer = Answer(text, [{"text": text}], entities, False, request.question, request.image, request.prompts)
            made.append((answer, TurnHistory([], [], None)))
        return made


def truth(known, sample, turn, request):
    return sample.turns[turn].text, [(t.written, t.mask) for t in ground_truths(known, sample, turn)]


def test_the_truth_scores_one_everywhere():
    records = [record(i) for i in range(3)]
    report = ev.evaluate(Oracle(records, truth), records, baselines={"mean_mask": Whole()})
    assert report["miou"] == report["entity_f1"] == {"I": 1, "II": 1, "III": 1, "IV": 1}
    assert report["intervals"]["miou"]["I"] == [1, 1]
    for name in ("dice", "ciou", "giou", "naming_accuracy", "vqa_closed_accuracy", "vqa_closed_accuracy_image_blanked"):
        assert report[name] == 1, name
    assert report["no_target_fpr"] == 0 and report["abstention"] == {"precision": 1, "recall": 1}
    assert report["majority_class_share"] == 0.5 and report["vqa_majority"] == 0.5 and report["vqa_majority_by_kind"] == 1
    assert report["n"]["samples"] == {"vqa": 6, "I": 9, "II": 6, "III": 6, "IV": 3}
    assert report["n"]["entities"] == {"I": 6, "II": 6, "III": 12, "IV": 3}
    assert report["n"]["no_target"] == 3 and report["n"]["vqa_closed"] == 6 and report["n"]["groups"] == 3
    assert report["per_entity"]["liver"]["miou"] == report["per_modality"]["CT"]["miou"] == 1
    share = np.mean([m.decode().mean() for r in records for m in r.masks if m.entity == "spleen"])
    assert report["per_entity"]["spleen"]["mean_mask_miou"] == pytest.approx(share, abs=1e-3)
    assert 0.02 < report["baselines"]["mean_mask"]["IV"] < 0.2
    json.dumps(report, allow_nan=False)
    assert "vqa_majority" in table(report)


class Whole:
    def predict(self, entity, height, width, image):
        assert image.shape == (height, width, 3) and image.any()
        return np.ones((height, width), bool)


def test_a_wrong_name_costs_the_mask_except_in_ii():
    records = [record()]

    def misnamed(known, sample, turn, request):
        text, named = truth(known, sample, turn, request)
        return text, [("gallbladder", mask) for _, mask in named]

    report = ev.evaluate(Oracle(records, misnamed), records)
    assert report["miou"] == {"I": 0, "II": 1, "III": 0, "IV": 0}
    assert report["naming_accuracy"] == 0 and report["entity_f1"] == {"I": 0, "II": 0, "III": 0, "IV": 0}


def test_masks_where_nothing_is_are_false_positives():
    records = [record(0), record(1)]

    def eager(known, sample, turn, request):
        text, named = truth(known, sample, turn, request)
        return text, named or [("kidney", np.ones((known.height, known.width), bool))] * (sample.perspective != "vqa")

    report = ev.evaluate(Oracle(records, eager), records)
    assert report["no_target_fpr"] == 1 and report["abstention"] == {"precision": None, "recall": 0}
    assert report["miou"]["I"] == 1 and report["entity_f1"]["I"] == pytest.approx(2 * 4 / (2 * 4 + 2), abs=1e-4)
    assert report["giou"] == pytest.approx(16 / 18, abs=1e-4)  # 8 answers an image are right, and one paints an absent structure
    assert report["ciou"] < 0.7


def test_extra_masks_cost_all_but_the_papers_convention():
    records = [record(i) for i in range(2)]

    def scattershot(known, sample, turn, request):
        text, named = truth(known, sample, turn, request)
        extra = [np.eye(known.height, known.width, k, bool) for k in range(5)]
        return text, [*named, *((named[0][0], mask) for mask in extra)] if named else named

    report = ev.evaluate(Oracle(records, scattershot), records)
    ones = {"I": 1, "II": 1, "III": 1, "IV": 1}
    assert report["miou"] == report["success_50"] == ones and report["dice"] == 1
    assert all(report["miou_strict"][p] == pytest.approx(1 / 6, abs=1e-4) for p in ("I", "II", "IV"))
    assert all(report["f1_50"][p] == pytest.approx(2 / 7, abs=1e-4) for p in ("I", "II", "IV"))
    assert report["dice_strict"] < 0.3 and report["ciou"] < 0.95 and report["giou"] < 0.95
    assert "miou_strict" in table(report) and report["intervals"]["ap50"]["I"]

    exact = ev.evaluate(Oracle(records, truth), records)
    assert exact["miou_strict"] == exact["f1_50"] == exact["ap50"] == ones
    assert exact["ciou"] == exact["giou"] == exact["dice_strict"] == 1
    assert set(exact["ap50_by_modality"]) == {"CT with prompt", "CT without prompt"}


def test_silence_is_no_hit_and_no_false_alarm():
    records = [record()]
    report = ev.evaluate(Oracle(records, lambda *_: ("", [])), records)
    assert report["miou"] == report["entity_f1"] == {"I": 0, "II": 0, "III": 0, "IV": 0}
    assert report["no_target_fpr"] == 0 and report["abstention"]["recall"] == 1
    assert report["abstention"]["precision"] == pytest.approx(1 / 8, abs=1e-4)
    assert report["naming_accuracy"] == 0 and report["vqa_closed_accuracy"] == 0


def test_ablated_runs_go_without_and_count_only_for_their_figure():
    records = [record(0), record(1)]

    def say(known, sample, turn, request):
        sees = request.image.any() and (bool(request.prompts) or not sample.turns[turn - 1].prompted)
        return truth(known, sample, turn, request) if sees else ("No.", [("spleen", np.zeros((known.height, known.width), bool))])

    oracle = Oracle(records, say)
    report = ev.evaluate(oracle, records)
    assert report["naming_accuracy"] == 1 and report["naming_accuracy_without_prompt"] == 0.5
    assert report["vqa_closed_accuracy"] == 1 and report["vqa_closed_accuracy_image_blanked"] == 0
    assert report["miou"] == {"I": 1, "II": 1, "III": 1, "IV": 1} and report["n"]["entities"]["II"] == 4
    blind = ev.evaluate(oracle, records, ablate="prompt")
    assert blind["naming_accuracy"] == 0.5 and blind["naming_accuracy_without_prompt"] is None and blind["miou"]["II"] == 0
    dark = ev.evaluate(oracle, records, ablate="image")
    assert dark["vqa_closed_accuracy"] == 0 and dark["miou"]["I"] == 0
    with pytest.raises(ValueError, match="ablate"):
        ev.evaluate(oracle, records, ablate="question")


def test_prompts_are_the_same_at_every_evaluation_and_lie_on_their_masks():
    records = [record()]
    first, second = Oracle(records, truth), Oracle(records, truth)
    ev.evaluate(first, records)
    ev.evaluate(second, records)
    drawn = 0
    for a, b in zip(first.requests, second.requests, strict=True):
        for name in ("points", "boxes"):
            np.testing.assert_array_equal(getattr(a.prompts, name), getattr(b.prompts, name))
        assert len(a.prompts.scribbles) == len(b.prompts.scribbles)
        drawn += bool(a.prompts)
    assert drawn == 4  # two of II, one of IV, and the second turn of III; II's ablated runs go without


def test_scores_are_held_against_the_iou_of_what_was_painted():
    records = [record(i) for i in range(3)]

    def say(known, sample, turn, request):
        text, named = truth(known, sample, turn, request)
        return text, [*named, ("kidney", np.ones((known.height, known.width), bool))] * (sample.perspective == "I")

    oracle = Oracle(records, say)
    score = ev.evaluate(oracle, records)["score"]
    assert score["n"] == 15 and score["calibrated"] is None  # 3 of I in an image, one of them of nothing: 2 right, 3 wrong
    assert score["plain"]["expected_calibration_error"] == pytest.approx(0.81 - 6 / 15, abs=1e-4)
    assert score["plain"]["spearman"] is None and score["plain"]["auroc"] == 0.5  # all scores are the same
    assert score["plain"]["uncertain"] == {"precision": None, "recall": 0}
    oracle.calibration = Calibration((0.0, 0.0, 0.0, 1.0), (-3.0, 3.0), (0.4, 0.4), uncertain_below=0.5)
    report = ev.evaluate(oracle, records)
    assert report["score"]["calibrated"]["expected_calibration_error"] == pytest.approx(0, abs=1e-4)
    assert report["score"]["calibrated"]["uncertain"] == {"precision": 0.6, "recall": 1}
    assert "calibrated" in table(report)


def test_spans_unite_their_targets_and_their_words_count_as_the_name():
    made = record()
    sample = Sample("u", "III", [Turn("user", "Show all. (9)"), Turn("assistant", "Both organs are outlined.")],
                    [Target(1, "liver", [0, 11], ["l"]), Target(1, "spleen", [0, 11], ["s"])])  # fmt: skip
    (one,) = ground_truths(made, sample, 1)
    assert one.name == one.written == "both organs"
    assert (one.mask == (made.mask("l").decode() | made.mask("s").decode())).all()
    sample.targets[1].span = [6, 12]
    sample.turns[1].text = "Liver organs"
    sample.targets[0].span = [0, 5]
    assert [(t.name, t.written) for t in ground_truths(made, sample, 1)] == [("liver", "liver"), ("spleen", "organs")]
    made.samples = [sample]
    report = ev.evaluate(Oracle([made], truth), [made])  # says "organs", which is written so: counts as the spleen
    assert report["entity_f1"]["III"] == report["miou"]["III"] == 1


def test_a_limit_spreads_over_perspectives_and_images():
    records = [record(i) for i in range(6)]
    chosen = select_samples(records, 10)
    picked = [records[n].samples[i].perspective for n, indices in chosen.items() for i in indices]
    assert len(chosen) >= 2 and {p: picked.count(p) for p in set(picked)} == {"vqa": 2, "I": 2, "II": 2, "III": 2, "IV": 2}
    assert chosen == select_samples(records, 10)
    assert sum(map(len, select_samples(records, None).values())) == 6 * len(records[0].samples)
    assert {records[n].samples[i].perspective for n, s in select_samples(records, None, ["vqa"]).items() for i in s} == {"vqa"}


def test_unusable_samples_are_listed_not_hidden(mimo):
    records = [record(0), record(1), record(2)]
    records[1].image = records[1].image[:60]
    records[2].samples[0].turns[0].text = ""
    report = ev.evaluate(mimo, records)
    assert report["n"]["unusable"] == len(records[1].samples) + 1
    reasons = {row["sample"]: row["reason"] for row in report["unusable"]}
    assert "question: is empty" in reasons[records[2].samples[0].sample_id]
    assert records[1].id in reasons[records[1].samples[3].sample_id]
    assert report["n"]["samples"]["II"] == 4 and "could not be used" in table(report)


def test_from_checkpoint_and_data_to_report_and_pictures(mimo, tmp_path, capsys, monkeypatch):
    records = [record(i, "test") for i in range(2)] + [handmade.record(i, "train") for i in range(2, 5)]
    write_records(tmp_path / "data", records, {"name": "handmade"})
    run = tmp_path / "run"
    checkpoint.open_run(run, mimo.config)
    (run / "tokenizer.json").write_bytes(open(mimo.tokenizer.path, "rb").read())
    frozen, train = pathtree.partition(mimo.engine.params, lambda path: path.startswith("vision/"))
    checkpoint.start_run(run, mimo.config, frozen)
    steps = checkpoint.Checkpoints(run)
    steps.save(1, {"params": train}, {})
    steps.wait()
    out = tmp_path / "report.json"
    report = ev.evaluate_checkpoint(run, tmp_path / "data", "test", out, overlays=tmp_path / "pictures")
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    assert set(report["baselines"]) == {"mean_mask", "threshold"} and report["baselines"]["mean_mask"]["I"] > 0.1
    assert report["n"]["samples"] == {"vqa": 4, "I": 6, "II": 4, "III": 4, "IV": 2}
    assert {p.name.split("_")[0] for p in (tmp_path / "pictures").glob("*.png")} == {"I", "II", "III", "IV"}
    printed = capsys.readouterr().out
    assert "miou" in printed and str(out) in printed
    assert len((tmp_path / "report.samples.jsonl").read_text().splitlines()) == 20
    assert compare_reports(out, out)[0].difference == 0

    write_records(tmp_path / "held_out", [record(i, "test") for i in range(2)], {"name": "held out"})
    alone = ev.evaluate_checkpoint(run, tmp_path / "held_out", "test", out)
    assert "held_out: has no split train; trivial baselines are left out" in capsys.readouterr().out
    assert alone["baselines"] == {} and alone["miou"] == report["miou"] and "not_evaluable" not in alone
    borrowed = ev.evaluate_checkpoint(run, tmp_path / "held_out", "test", out, baselines_from=tmp_path / "data")
    assert borrowed["baselines"] == report["baselines"]
    with pytest.raises(UserError, match="held_out: has no split 'val'; it has test"):
        ev.evaluate_checkpoint(run, tmp_path / "held_out", "val", out)

    read, get = Counter(), RecordFolder.__getitem__

    def counted(self, position):
        record = get(self, position)  # raises IndexError at the end of an iteration
        read[self.split] += 1
        return record

    monkeypatch.setattr(RecordFolder, "__getitem__", counted)
    limited = ev.evaluate_checkpoint(run, tmp_path / "data", "test", out, limit=5)
    assert sum(limited["n"]["samples"].values()) == 5 and limited["not_evaluable"] == report["not_evaluable"]
    assert read == {"test": 1, "train": 3}, "of test what is asked, of train each record once, for the baselines"
    with pytest.raises(UserError, match="nowhere"):
        ev.evaluate_checkpoint(run, tmp_path / "data", "test", tmp_path / "nowhere" / "report.json")


def test_during_training_it_reads_the_runs_own_sources(mimo, tmp_path):
    write_records(tmp_path / "data", [record(0, "val"), handmade.record(1, "train")], {"name": "handmade"})
    config = Config.from_dict(mimo.config.to_dict())
    config.data.sources = {"a": SourceConfig(str(tmp_path / "data"))}
    config.data.weights = {"I": 1.0, "II": 1.0, "vqa": 0.0}
    report = ev.evaluate_params(config, mimo.engine.params, mimo.tokenizer, overlays=tmp_path / "pictures", overlay_count=1)
    assert report["n"]["samples"] == {"vqa": 0, "I": 3, "II": 2, "III": 0, "IV": 0}
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 1
    assert ev.evaluate_params(config, mimo.engine.params, mimo.tokenizer, split="test") is None


def test_every_turn_has_a_picture_of_its_own(tmp_path):
    asked = record()
    asked.samples = [sample for sample in asked.samples if len(sample.turns) == 4]
    ev.evaluate(Oracle([asked], truth), [asked], overlays=tmp_path, overlay_count=400)
    first, second = sorted(path.stem for path in tmp_path.glob("*.png"))
    assert first.startswith("III_") and second == f"{first}_2"


def test_the_page_on_evaluation_names_every_metric():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    apart = {"naming_accuracy_without_prompt", "majority_class_share", "vqa_majority_by_kind", "vqa_closed_accuracy_by_kind"}
    apart |= {"per_modality", "per_entity"}  # lines that the table of a report explains
    assert [name for name in METRICS if f"`{name}`" not in page and name not in apart] == []


@pytest.fixture
def toy_metric():
    """A metric of a project that uses this package: pixels painted where nothing is."""
    register_metric("pixels_of_nothing", lambda results: sum(a.segmented_px for a in results.abstentions if a.no_target), "toy: in pixels")
    register_metric("entities_hit", lambda results: Ratio(results.entities, [e.iou > 0.5 for e in results.entities]))
    yield
    del METRICS["pixels_of_nothing"], METRICS["entities_hit"]


def test_a_metric_from_outside_stands_in_report_table_and_conventions(toy_metric):
    records = [record(i) for i in range(3)]
    report = ev.evaluate(Oracle(records, truth), records)
    assert report["pixels_of_nothing"] == 0 and report["conventions"]["pixels_of_nothing"] == "toy: in pixels"
    assert report["entities_hit"] == 1 and report["intervals"]["entities_hit"] == [1, 1]
    printed = table(report).splitlines()
    assert "pixels_of_nothing: toy: in pixels" in printed
    assert [line.split() for line in printed if line.startswith("entities_hit")] == [["entities_hit", "1.000", "±0.000"]]
    with pytest.raises(ValueError, match="^metric entities_hit: is registered already"):
        register_metric("entities_hit", len)
    with pytest.raises(ValueError, match="^metric new: format is 'row'; use one of perspectives"):
        register_metric("new", len, format="row")
