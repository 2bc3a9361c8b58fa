"""Metrics of the masks of perspectives I to IV, one function each, by the paper's convention and by strict ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from mimo_jax.config import PERSPECTIVES, PROMPTED
from mimo_jax.eval import metrics
from mimo_jax.eval.accumulator import Accumulator, EntityResult, TurnResult
from mimo_jax.eval.average_precision import AveragePrecision
from mimo_jax.eval.registry import Ratio, Resampled, grouped, mean
from mimo_jax.eval.surface import TOLERANCE

GROUNDED = tuple(p for p in PERSPECTIVES if p != "vqa")
# Sizes of a structure as fractions of its image: name -> upper bound.
SIZES = {"below 0.1 %": 1e-3, "0.1 to 1 %": 1e-2, "1 to 10 %": 1e-1, "10 % and more": float("inf")}


# --- the paper's convention: extra masks do not count ------------------------------------------------------------------


def miou(results: Accumulator) -> dict[str, Ratio]:
    return _of_entities(results, lambda e: e.iou)


def dice(results: Accumulator) -> Ratio:
    return Ratio(results.entities, [metrics.dice_from_iou(e.iou) for e in results.entities])


def success_50(results: Accumulator) -> dict[str, Ratio]:
    return _of_entities(results, lambda e: e.iou >= 0.5)


def dice_by_size(results: Accumulator) -> dict[str, Ratio]:
    rows: dict[str, list[EntityResult]] = {name: [] for name in SIZES}
    for entity in results.entities:
        rows[next(name for name, bound in SIZES.items() if entity.true_px < bound * entity.image_px)].append(entity)
    return {name: Ratio(of_size, [metrics.dice_from_iou(e.iou) for e in of_size]) for name, of_size in rows.items()}


def surface(results: Accumulator) -> dict[str, Ratio]:
    found: dict[str, Ratio] = {}
    for unit, rows in (("px", results.entities), ("mm", [e for e in results.entities if e.has_mm])):
        pairs = [e.surface_px if unit == "px" else e.surface_mm for e in rows]
        found[f"NSD {TOLERANCE:g} {unit}"] = Ratio(rows, [pair[0] if pair else 0.0 for pair in pairs])
        found[f"HD95 {unit}"] = Ratio(rows, [pair[1] if pair else 0.0 for pair in pairs], [pair is not None for pair in pairs])
    found["with a mask"] = Ratio(results.entities, [e.surface_px is not None for e in results.entities])
    return found


# --- strict conventions: extra masks count -----------------------------------------------------------------------------


def miou_strict(results: Accumulator) -> dict[str, Ratio]:
    return {p: _strict_mean(rows, lambda iou: iou) for p, rows in _asked(results).items()}


def dice_strict(results: Accumulator) -> Ratio:
    return _strict_mean([turn for turn in results.turns if turn.asked], metrics.dice_from_iou)


def _strict_mean(rows: Sequence[TurnResult], value: Callable[[float], float]) -> Ratio:
    matched = [metrics.strict_match(turn.names, turn.predicted, turn.ious) for turn in rows]
    return Ratio(rows, [sum(map(value, pairs)) for pairs, _ in matched], [len(pairs) + unmatched for pairs, unmatched in matched])


def f1_50(results: Accumulator) -> dict[str, Ratio]:
    return {
        p: Ratio(
            rows,
            [2 * metrics.count_pairs(turn.names, turn.predicted, turn.ious) for turn in rows],
            [len(turn.names) + len(turn.predicted) for turn in rows],
        )
        for p, rows in _asked(results).items()
    }


def ap50(results: Accumulator) -> dict[str, Resampled]:
    return {p: Resampled(rows, AveragePrecision(rows)) for p, rows in _asked(results).items()}


def ap50_by_modality(results: Accumulator) -> dict[str, Resampled]:
    def kind(turn: TurnResult) -> str:
        return f"{turn.modality} {'with' if turn.perspective in PROMPTED else 'without'} prompt"

    return {name: Resampled(rows, AveragePrecision(rows)) for name, rows in grouped((t for t in results.turns if t.asked), kind).items()}


def ciou(results: Accumulator) -> Ratio:
    rows = [turn for turn in results.turns if turn.asked]
    return Ratio(rows, [turn.overlap[0] for turn in rows], [turn.overlap[1] for turn in rows])


def giou(results: Accumulator) -> Ratio:
    rows = [turn for turn in results.turns if turn.asked]
    return Ratio(rows, [metrics.iou_of_pair(*turn.overlap) for turn in rows])


def instances(results: Accumulator) -> dict[str, Ratio]:
    rows = results.instances
    penalty = [row.tp + (row.fp + row.fn) / 2 for row in rows]
    return {
        "PQ": Ratio(rows, [row.iou for row in rows], penalty),
        "SQ": Ratio(rows, [row.iou for row in rows], [row.tp for row in rows]),
        "RQ": Ratio(rows, [row.tp for row in rows], penalty),
    }


# --- trivial predictors and breakdowns ---------------------------------------------------------------------------------


def baselines(results: Accumulator) -> dict[str, dict[str, float | None]]:
    kinds = sorted({name for e in results.entities for name in e.baselines})
    return {k: {p: mean(e.baselines[k] for e in results.entities if e.perspective == p) for p in GROUNDED} for k in kinds}


def per_modality(results: Accumulator) -> dict[str, dict]:
    return _breakdown(results, lambda e: e.modality)


def per_entity(results: Accumulator) -> dict[str, dict]:
    return _breakdown(results, lambda e: e.entity)


def _breakdown(results: Accumulator, key: Callable[[EntityResult], str]) -> dict[str, dict]:
    """The miou, dice, baselines and counts of each modality or entity, over perspectives I to IV."""
    return {
        name: {
            "miou": mean(e.iou for e in rows),
            "dice": mean(metrics.dice_from_iou(e.iou) for e in rows),
            **{f"{b}_miou": mean(e.baselines[b] for e in rows) for b in sorted(rows[0].baselines)},
            "n": len(rows),
            "groups": len({e.group for e in rows}),
        }
        for name, rows in grouped(results.entities, key).items()
    }


def _of_entities(results: Accumulator, value: Callable[[EntityResult], float]) -> dict[str, Ratio]:
    rows = _by_perspective(results.entities)
    return {p: Ratio(of_p, list(map(value, of_p))) for p, of_p in rows.items()}


def _asked(results: Accumulator) -> dict[str, list[TurnResult]]:
    """The turns that ask for a present or absent entity, by perspective."""
    return _by_perspective(turn for turn in results.turns if turn.asked)


def _by_perspective(rows: Iterable) -> dict[str, list]:
    rows = list(rows)
    return {p: [row for row in rows if row.perspective == p] for p in GROUNDED}
