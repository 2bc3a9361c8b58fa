"""What a run should know of its data before its first step: long conversations, objects too small for a mask, samples without a target."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mimo_jax.config import Config
from mimo_jax.data.loading.sources import Manifest
from mimo_jax.data.loading.split_conversations import user_turns
from mimo_jax.data.records import RecordFolder
from mimo_jax.data.schema import Record
from mimo_jax.errors import UserError
from mimo_jax.geometry import sam_frame

_RECORDS = 1000  # of each source that are read, evenly spaced
_READERS = 16  # threads
_MANY_SMALL, _MANY_ABSENT = 0.05, 0.5  # shares from which on a remedy is printed


def data_lines(config: Config, sources: Mapping[str, RecordFolder | Manifest]) -> dict[str, str]:
    """Texts by the name of their line. Shares are of at most 1,000 records of each source; what cannot be read is left out here, and
    counted while the run trains."""
    lines = {}
    if text := _conversations(config, sources):
        lines["turns"] = text
    records = {name: _some_records(source) for name, source in sources.items()}
    if text := _small_objects(config, [record for some in records.values() for record in some]):
        lines["objects"] = text
    if text := _without_target(config, records):
        lines["targets"] = text
    return lines


def _conversations(config: Config, sources: Mapping[str, RecordFolder | Manifest]) -> str:
    """What happens to conversations of several turns; empty if there are none."""
    limit = config.model.max_turns
    turns = np.concatenate([user_turns(source) for source in sources.values()] or [np.zeros(0, int)])
    long, whole = turns[turns > limit], np.count_nonzero((turns > 1) & (turns <= limit))
    if not len(long):
        return f"{whole:,} conversations of several turns, all whole" if whole else ""
    parts = int(np.ceil(long / limit).sum())
    kept = f"; {whole:,} shorter ones are whole" if whole else ""
    return (
        f"{len(long):,} conversations have more user turns than config.model.max_turns ({limit}) and are split into {parts:,} samples"
        f"{kept}; {turns.max()} would keep all whole"
    )


def _small_objects(config: Config, records: list[Record]) -> str:
    """The shares of masks that are too small for the grid of the targets; empty if there are no masks."""
    sides = np.array([_side_in_cells(config, record, mask.box_xyxy) for record in records for mask in record.masks])
    if not len(sides):
        return ""
    below = f"{_share(sides < 1)} of {len(sides):,} masks are narrower than a cell of the {config.target_side()}² target, "
    remedy = f"; these are hardly learnt: crop or tile the images, or raise config.model.sam.image_size ({config.model.sam.image_size})"
    return f"{below}{_share(sides < 2)} than two{remedy if (sides < 2).mean() >= _MANY_SMALL else ''}"


def _side_in_cells(config: Config, record: Record, box: list[int]) -> float:
    """The shorter side of a box, in cells of the target mask."""
    sam = config.model.sam
    frame = sam_frame(record.height, record.width, sam.image_size, sam.image_fit)
    cells = config.target_side() / frame.side
    return min((box[2] - box[0]) * frame.scale_x, (box[3] - box[1]) * frame.scale_y) * cells


def _without_target(config: Config, records: Mapping[str, list[Record]]) -> str:
    """The share of grounded samples, as they are drawn, whose answer segments nothing; empty if there are no grounded samples."""
    absent, total = 0.0, 0.0
    for perspective, weight in config.data.weights.items():
        if perspective == "vqa":
            continue
        found = {
            name: [all(target.absent for target in s.targets) for record in some for s in record.samples if s.perspective == perspective]
            for name, some in records.items()
            if perspective in map(str.strip, config.data.sources[name].perspectives.split(","))
        }
        weights = {name: config.data.sources[name].weight for name, values in found.items() if values}
        for name in weights:
            drawn = weight * weights[name] / sum(weights.values())
            absent, total = absent + drawn * float(np.mean(found[name])), total + drawn
    if not total:
        return ""
    remedy = (
        "; a model that mostly sees absent structures learns to deny them: add a source in which they are present, "
        "such as earlier data, and weigh it (config.data.sources.NAME.weight)"
    )
    return f"{absent / total:.1%} of the samples of I to IV segment nothing{remedy if absent / total >= _MANY_ABSENT else ''}"


def _some_records(source: RecordFolder | Manifest) -> list[Record]:
    def read(number: int) -> Record | None:
        try:
            return source[number]
        except UserError:
            return None

    numbers = np.unique(np.linspace(0, len(source) - 1, min(len(source), _RECORDS)).astype(int)).tolist()
    with ThreadPoolExecutor(_READERS) as pool:
        return [record for record in pool.map(read, numbers) if record is not None]


def _share(values: np.ndarray) -> str:
    return f"{values.mean():.1%}"
