"""Two evaluations of the same samples: differences by hand, intervals by patient, and refusals."""

import json

import numpy as np
import pytest

from mimo_jax.eval import evaluate as ev
from mimo_jax.eval import metrics
from mimo_jax.eval.compare import CompareError, compare_reports, difference, samples_path, table, write_samples
from mimo_jax.eval.registry import compute_metrics, values_by_sample
from tests.eval.test_evaluate import Oracle, record, truth


def results(records, say):
    oracle = Oracle(records, say)
    return ev.collect_results(oracle, records, ev.select_samples(records, None), [None, *ev.ABLATIONS])


def write(path, rows):
    path.write_text("{}")
    write_samples(rows, path)
    return path


def half(known, sample, turn, request):
    """Right about every other image, and silent about the rest."""
    return truth(known, sample, turn, request) if int(known.id[-1]) % 2 else ("", [])


def test_differences_are_those_of_the_reports(tmp_path):
    records = [record(i) for i in range(4)]
    for sample in (sample for made in records for sample in made.samples if sample.kind == "count"):
        sample.answer_type, sample.kind = "open", ""
    good, poor = results(records, truth), results(records, half)
    a, b = write(tmp_path / "a.json", values_by_sample(good)), write(tmp_path / "b.json", values_by_sample(poor))
    found = {row.metric: row for row in compare_reports(a, b)}
    (values_a, _), (values_b, _) = compute_metrics(good), compute_metrics(poor)
    for name in ("miou", "miou_strict", "entity_f1", "vqa_open"):
        for part, value in values_a[name].items():
            row = found[f"{name}/{part}"]
            assert (row.a, row.b) == (pytest.approx(value, abs=1e-4), pytest.approx(values_b[name][part], abs=1e-4))
            assert row.difference == pytest.approx(row.b - row.a) and row.interval[0] <= row.difference <= row.interval[1]
    assert found["miou/I"].difference == -0.5 and found["miou/I"].groups == 4 and found["miou/I"].samples == 8
    assert found["vqa_open/bleu_1"].a == 1 and found["vqa_open/rouge_l"].b == 0.5
    assert found["vqa_closed_accuracy"].b == 0.5 and found["abstention/recall"].difference == 0
    text = table(a, b, list(found.values()))
    assert f"A: {a}" in text and "miou/I" in text and "-0.500" in text


def test_the_interval_is_of_the_paired_difference_over_patients():
    rng = np.random.default_rng(0)
    groups = [f"p{i // 4}" for i in range(40)]
    shared = np.repeat(rng.random(10), 4)  # hard and easy patients: equal for both
    a = [{"group": g, "values": {"m": [v, 1]}} for g, v in zip(groups, shared, strict=True)]
    b = [{"group": g, "values": {"m": [v + 0.1 + 0.01 * rng.normal(), 1]}} for g, v in zip(groups, shared, strict=True)]
    found = difference("m", a, b)
    assert found.difference == pytest.approx(0.1, abs=0.01) and found.interval[1] - found.interval[0] < 0.02
    alone = metrics.bootstrap_ci(shared, np.ones(40), groups)
    assert alone[1] - alone[0] > 0.1
    counts, index = metrics.cluster_draws(groups)
    change = np.array([y["values"]["m"][0] - x["values"]["m"][0] for x, y in zip(a, b, strict=True)])
    drawn = counts @ np.bincount(index, weights=change) / (4 * 10)
    assert found.interval == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=1e-9)


def test_a_metric_that_one_lacks_has_no_difference():
    rows = [{"group": "p", "values": {"m": [1, 2]}}]
    found = difference("m", rows, [{"group": "p", "values": {"m": [0, 0]}}])
    assert (found.a, found.b, found.difference, found.interval) == (0.5, None, None, None)


def test_other_data_is_refused(tmp_path):
    rows = [{"sample": f"s{i}", "group": "p", "truth": "t", "values": {"m": [1, 1]}} for i in range(3)]
    a = write(tmp_path / "a.json", rows)
    with pytest.raises(CompareError, match="a.json: 1 of its 3 samples are not in .*fewer.json, such as s2; evaluate both on the same"):
        compare_reports(a, write(tmp_path / "fewer.json", rows[:2]))
    other = write(tmp_path / "other.json", [rows[0], rows[1] | {"truth": "u"}, rows[2]])
    with pytest.raises(CompareError, match="other.json: sample s1 has another image, text, mask or patient than in .*a.json"):
        compare_reports(a, other)
    with pytest.raises(CompareError, match="none.json: no such file"):
        compare_reports(a, tmp_path / "none.json")
    samples_path(other).write_text('{"sample": 1}\n')
    with pytest.raises(CompareError, match="other.samples.jsonl: is damaged"):
        compare_reports(a, other)
    samples_path(other).unlink()
    with pytest.raises(CompareError, match="other.samples.jsonl: is missing"):
        compare_reports(a, other)


def test_changed_masks_and_texts_are_other_data():
    one = results([record()], truth).scored
    changed = record()
    changed.samples[0].turns[0].text += " now"
    changed.samples[0].turns[0].prompted = list(changed.samples[0].turns[0].prompted)
    other = results([changed], truth).scored
    assert sum(a.truth != b.truth for a, b in zip(one, other, strict=True)) == 1
    assert json.dumps([row.truth for row in one]) == json.dumps([row.truth for row in results([record()], truth).scored])
