"""Every metric of masks against another implementation on 1,000 random cases: pycocotools, LISA's formula, or all assignments in turn."""

import contextlib
import io
import itertools
from collections import Counter

import numpy as np
import pytest
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mimo_jax.eval import mask_metrics, metrics
from mimo_jax.eval.accumulator import Accumulator, EntityResult, InstanceResult, TurnResult
from mimo_jax.eval.average_precision import AveragePrecision

CASES = 1000


def blob(rng, side=8):
    """A rectangle, at times with holes or as two parts."""
    mask = np.zeros((side, side), bool)
    for _ in range(rng.integers(1, 3)):
        y, x = rng.integers(0, side - 2, 2)
        mask[y : y + rng.integers(1, 5), x : x + rng.integers(1, 5)] = True
    return mask & (rng.random(mask.shape) > 0.1) | (np.arange(side * side).reshape(side, side) == rng.integers(side * side))


def shifted(mask, rng):
    """A mask that overlaps `mask` more or less."""
    return np.roll(mask, rng.integers(-1, 2, 2), (0, 1)) & (rng.random(mask.shape) > 0.15)


class Turn:
    """True and predicted masks with their names, and the row that the evaluation makes of them."""

    def __init__(self, rng, number, perspective="I", names="ab"):
        self.true = [(str(rng.choice(list(names))), blob(rng)) for _ in range(rng.integers(0, 4))]
        found = [(name, shifted(mask, rng)) for name, mask in self.true if rng.random() < 0.8]
        found += [(str(rng.choice(list(names))), blob(rng)) for _ in range(rng.integers(0, 3))]
        self.found = [found[i] for i in rng.permutation(len(found))]
        self.scores = [float(score) for score in rng.integers(1, 12, len(found)) / 12]  # with ties
        nothing = np.zeros((8, 8), bool)
        self.unions = [np.logical_or.reduce([nothing, *(mask for _, mask in part)]) for part in (self.true, self.found)]
        ious = [[metrics.iou(t, p) for _, p in self.found] for _, t in self.true]
        self.row = TurnResult(
            f"s{number}", f"g{number % 3}", perspective, "CT",
            [n for n, _ in self.true], [n for n, _ in self.found], ious, self.scores, True, metrics.overlap(*self.unions),
        )  # fmt: skip


def turns(case, count=4, **options):
    rng = np.random.default_rng(case)
    return [Turn(rng, number, **options) for number in range(count)]


def results(some):
    return Accumulator(turns=[turn.row for turn in some])


def cocos_ap50(some, one_class=False):
    """The mean of COCO's precision at IoU 0.5; nan without true entities."""

    def number_of(name):
        return 1 if one_class else "ab".index(name) + 1

    def rle(mask):
        return coco.encode(np.asfortranarray(mask.astype(np.uint8)))

    truth, found = [], []
    for image, turn in enumerate(some, 1):
        for name, mask in turn.true:
            truth.append({"id": len(truth) + 1, "image_id": image, "category_id": number_of(name), "segmentation": rle(mask), "iscrowd": 0,
                          "area": int(mask.sum()), "bbox": [0, 0, 1, 1]})  # fmt: skip
        for (name, mask), score in zip(turn.found, turn.scores, strict=True):
            found.append({"image_id": image, "category_id": number_of(name), "segmentation": rle(mask), "score": score})
    if not truth:
        return float("nan")
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = {"images": [{"id": i + 1, "height": 8, "width": 8} for i in range(len(some))],
                           "categories": [{"id": 1}, {"id": 2}], "annotations": truth}  # fmt: skip
        dataset.createIndex()
        if not found:
            return 0.0
        run = COCOeval(dataset, dataset.loadRes(found), "segm")
        run.params.iouThrs = np.array([0.5])
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][0, :, :, 0, -1]  # [recalls, categories]: all areas, 100 detections
    return float(precision[precision > -1].mean())


def test_ap50_is_cocos():
    for case in range(CASES):
        one_class = case % 3 == 0
        some = turns(case, perspective="II" if one_class else "I")
        ours = AveragePrecision([turn.row for turn in some])(np.ones((1, len(some)), int))[0]
        assert ours == pytest.approx(cocos_ap50(some, one_class), abs=1e-9, nan_ok=True), case


def test_a_draw_of_the_bootstrap_is_the_ap50_of_its_turns():
    for case in range(100):
        rows = [turn.row for turn in turns(case)]
        for number, row in enumerate(rows):  # no scores are equal: their order would matter
            row.scores[:] = [score + 1e-4 * (10 * number + place) for place, score in enumerate(row.scores)]
        counts = np.random.default_rng(case).integers(0, 3, (5, len(rows)))
        drawn = AveragePrecision(rows)(counts)
        for count, ap in zip(counts, drawn, strict=True):
            repeated = [row for row, n in zip(rows, count, strict=True) for _ in range(n)]
            assert ap == pytest.approx(AveragePrecision(repeated)(np.ones((1, len(repeated)), int))[0], abs=1e-9, nan_ok=True)


def assignments(turn):
    """Every one-to-one assignment of predictions to true entities of equal name: a list of IoUs of its pairs."""
    t, p = len(turn.true), len(turn.found)
    for order in set(itertools.permutations([*range(p), *[None] * t], t)):
        if all(j is None or turn.true[i][0] == turn.found[j][0] for i, j in enumerate(order)):
            yield [metrics.iou(turn.true[i][1], turn.found[j][1]) for i, j in enumerate(order) if j is not None]


def test_strict_iou_and_f1_are_the_best_of_all_assignments():
    for case in range(CASES // 2):
        some = turns(case, count=2)
        total = count = hits = 0
        for turn in some:
            tried = [[iou for iou in pairs if iou > 0] for pairs in assignments(turn)]
            best = max(tried, key=lambda pairs: (round(sum(pairs), 9), len(pairs)))
            total += sum(best)
            count += len(turn.true) + len(turn.found) - len(best)
            hits += max(sum(iou >= 0.5 for iou in pairs) for pairs in tried)
        sizes = sum(len(turn.true) + len(turn.found) for turn in some)
        strict = mask_metrics.miou_strict(results(some))["I"].value()
        assert strict == pytest.approx(total / count if count else np.nan, abs=1e-9, nan_ok=True)
        f1 = mask_metrics.f1_50(results(some))["I"].value()
        assert f1 == pytest.approx(2 * hits / sizes if sizes else np.nan, abs=1e-9, nan_ok=True)


def test_ciou_and_giou_are_lisas_but_for_its_epsilon():
    """LISA: intersection / (union + 1e-5) of each mask, 1 if the union is empty; sum / (sum + 1e-10)."""
    for case in range(CASES):
        some = turns(case)
        inter = [(turn.unions[0] & turn.unions[1]).sum() for turn in some]
        union = [(turn.unions[0] | turn.unions[1]).sum() for turn in some]
        plain = [i / u if u else 1.0 for i, u in zip(inter, union, strict=True)]
        lisa = [i / (u + 1e-5) if u else 1.0 for i, u in zip(inter, union, strict=True)]
        giou = mask_metrics.giou(results(some)).value()
        assert giou == pytest.approx(np.mean(plain), abs=1e-9) and giou == pytest.approx(np.mean(lisa), abs=1e-5)
        assert mask_metrics.ciou(results(some)).value() == pytest.approx(sum(inter) / (sum(union) + 1e-10) if sum(union) else np.nan,
                                                                        abs=1e-9, nan_ok=True)  # fmt: skip


def components(mask):
    """8-connected components by flood fill."""
    left, found = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}, []
    while left:
        part, todo = set(), [left.pop()]
        while todo:
            y, x = todo.pop()
            part.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            todo += near
        found.append(part)
    return found


def test_panoptic_quality_is_kirillovs():
    """Of instances that do not overlap: every pair with IoU > 0.5 is a match; PQ = summed IoU / (TP + FP/2 + FN/2)."""
    for case in range(CASES):
        rng = np.random.default_rng(case)
        true = components(rng.random((8, 8)) < 0.3)
        masks = [np.array([[(y, x) in part for x in range(8)] for y in range(8)]) for part in true]
        painted = np.logical_or.reduce([np.zeros((8, 8), bool), *masks]) ^ (rng.random((8, 8)) < 0.05)
        found = components(painted)
        ious = [len(a & b) / len(a | b) for a in true for b in found if len(a & b) / len(a | b) > 0.5]
        counts = metrics.match_instances(masks, [painted])
        assert counts == (pytest.approx(sum(ious), abs=1e-9), len(ious), len(found) - len(ious), len(true) - len(ious))
        quality = mask_metrics.instances(Accumulator(instances=[InstanceResult("s", "g", "nucleus", *counts)]))
        halves = len(ious) + (len(found) + len(true) - 2 * len(ious)) / 2
        assert quality["PQ"].value() == pytest.approx(sum(ious) / halves if halves else np.nan, abs=1e-9, nan_ok=True)
        if ious:
            assert quality["SQ"].value() * quality["RQ"].value() == pytest.approx(quality["PQ"].value(), abs=1e-9)


def test_instances_without_a_prediction_are_missed():
    one = np.eye(4, dtype=bool)
    assert metrics.match_instances([one, ~one], []) == (0.0, 0, 0, 2)
    assert metrics.match_instances([], [one]) == (0.0, 0, 1, 0)


def test_dice_by_size_puts_each_structure_into_one_bin():
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        made = [EntityResult("s", "g", "I", "CT", "e", rng.random(), int(px), 10_000) for px in 10 ** rng.uniform(0, 4, 5)]
        found = mask_metrics.dice_by_size(Accumulator(entities=made))
        wanted: dict[str, list[float]] = {name: [] for name in mask_metrics.SIZES}
        for e in made:
            share = 100 * e.true_px / e.image_px
            name = "below 0.1 %" if share < 0.1 else "0.1 to 1 %" if share < 1 else "1 to 10 %" if share < 10 else "10 % and more"
            wanted[name].append(2 * e.iou / (1 + e.iou))
        for name, values in wanted.items():
            assert found[name].value() == pytest.approx(np.mean(values) if values else np.nan, abs=1e-9, nan_ok=True)


def test_miou_and_success_of_random_turns_count_no_extra():
    """The paper's convention is a mean over the true entities of the best assignment."""
    for case in range(CASES // 4):
        some = turns(case, count=2)
        entities = []
        for turn in some:
            pairs = metrics.match(turn.row.names, turn.row.predicted, turn.row.ious)
            assert sum(v for _, v in pairs) == pytest.approx(max(sum(ious) for ious in assignments(turn)), abs=1e-9)
            entities += [EntityResult("s", "g", "I", "CT", name, v, 1, 9) for name, (_, v) in zip(turn.row.names, pairs, strict=True)]
        found = Accumulator(entities=entities)
        if entities:
            assert mask_metrics.miou(found)["I"].value() == pytest.approx(np.mean([e.iou for e in entities]), abs=1e-9)
            assert mask_metrics.success_50(found)["I"].value() == pytest.approx(np.mean([e.iou >= 0.5 for e in entities]), abs=1e-9)


def test_names_are_counted_as_multisets():
    for case in range(CASES):
        some = turns(case, names="abc")
        true, found = ([Counter(n for n, _ in part) for part in parts] for parts in zip(*((t.true, t.found) for t in some), strict=True))
        tp = sum(min(a[n], b[n]) for a, b in zip(true, found, strict=True) for n in "abc")
        sizes = sum(sum(c.values()) for c in (*true, *found))
        counted = [metrics.name_counts(t.row.names, t.row.predicted) for t in some]
        f1 = metrics.f1(*map(sum, zip(*counted, strict=True)))
        assert f1 == pytest.approx(2 * tp / sizes if sizes else np.nan, abs=1e-9, nan_ok=True)
