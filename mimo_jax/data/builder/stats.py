"""Statistics of a record folder, as a paper reports them: counts, lengths of questions and areas of masks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from mimo_jax.data.records import RecordFolder, read_info

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = (0, 4, 6, 8, 10, 15, 20, 40)  # words of a user turn; lower edges of the bins
AREAS = (0.0, 0.0001, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5)  # area of a mask as a share of its image; lower edges of the bins
_BY_TARGET = ("structure", "absent")  # of targets that are shown, and of those that are not
_MAX_ROWS = 50  # maximum number of bars of a plot and lines of a table
_MAX_LABEL = 50  # maximum characters of the name next to a bar
_BAR_COLOR = "#3c78be"


def statistics(folder: str | os.PathLike, progress: bool = True) -> dict:
    """Counts of a record folder by split, and over all of it by perspective, modality, data set, entity, kind of question,
    structure that a question of I to IV segments or that it asks for in vain, length of a question in words, and area of a mask. Reads
    every record; raises DataError for one that cannot be read."""
    names = ("images", "groups", "masks", "samples", "no_target")
    splits: dict[str, dict] = {}
    by: dict[str, Counter] = {
        key: Counter() for key in ("perspective", "modality", "dataset", "entity", "kind", *_BY_TARGET, "words", "area")
    }
    of_modality: dict[str, Counter] = {}
    info = read_info(folder)
    total = sum(split["records"] for split in info["splits"].values())
    with tqdm(total=total, unit="image", disable=not progress) as bar:
        for name in info["splits"]:
            records = RecordFolder(folder, name)
            groups, counts = set(), Counter()
            for record in (records[i] for i in range(len(records))):
                groups.add(record.group)
                counts.update(images=1, masks=len(record.masks), samples=len(record.samples))
                by["modality"][record.modality] += 1
                by["dataset"][record.dataset or "unknown"] += 1
                for mask in record.masks:
                    by["entity"][mask.entity] += 1
                    by["area"][_bin(mask.area_px / (record.height * record.width), AREAS)] += 1
                for sample in record.samples:
                    by["perspective"][sample.perspective] += 1
                    by["kind"][f"{sample.perspective} {sample.kind}".strip()] += 1
                    if sample.perspective != "vqa":
                        for absent, key in enumerate(_BY_TARGET):
                            by[key].update({target.entity for target in sample.targets if target.absent == bool(absent)})
                        counts["no_target"] += any(target.absent for target in sample.targets)
                    of_modality.setdefault(record.modality, Counter())[sample.perspective] += 1
                    by["words"].update(_bin(len(turn.text.split()), WORDS) for turn in sample.turns if turn.role == "user")
                bar.update()
            splits[name] = {key: counts[key] for key in names} | {"groups": len(groups)}
    overall = {key: sum(split[key] for split in splits.values()) for key in names}
    counted = {key: _ranked(counter) for key, counter in by.items()}
    counted["words"], counted["area"] = (_binned(by[key], edges) for key, edges in (("words", WORDS), ("area", AREAS)))
    return {
        **{key: info[key] for key in ("name", "builder", "builder_version", "seed") if key in info},
        "splits": splits, "all": overall, **counted,
        "perspective_by_modality": {modality: _ranked(of_modality[modality]) for modality in sorted(of_modality)},
        "licences": _summed(split["licences"] for split in info["splits"].values()), "warnings": info.get("warnings", {}),
    }  # fmt: skip


def _bin(value: float, edges: tuple) -> int:
    return int(np.searchsorted(edges, value, side="right")) - 1


def _binned(counter: Counter, edges: tuple) -> dict[str, int]:
    shown = [f"{edge:g}" if edges is WORDS else f"{100 * edge:g} %" for edge in edges]
    names = [f"{low} to below {high}" for low, high in zip(shown, shown[1:], strict=False)]
    return {name: counter[i] for i, name in enumerate([*names, f"{shown[-1]} or more"])}


def _ranked(counter: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counter.items(), key=lambda item: (-item[1], item[0])))


def _summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return _ranked(total)


def describe(stats: Mapping) -> str:
    """The tables of `statistics` as text, each cut to its first lines."""
    head = f"{'':8}{'images':>10}{'groups':>10}{'masks':>10}{'samples':>10}{'no target':>11}"
    counts = {**stats["splits"], "all": stats["all"]}
    rows = [f"{name:8}" + "".join(f"{row[key]:10}" for key in _COLUMNS) + f"{row['no_target']:11}" for name, row in counts.items()]
    asked = sum(n for perspective, n in stats["perspective"].items() if perspective != "vqa")
    share = f"no target: {stats['all']['no_target'] / max(1, asked):.1%} of the samples of I to IV ask for what is not in the image"
    lines = [head, *rows, share]
    for key, title in TITLES.items():
        lines += ["", title, *_table(stats[key])]
    return "\n".join(lines)


_COLUMNS = ("images", "groups", "masks", "samples")
TITLES = {
    "perspective": "samples by perspective", "kind": "samples by kind of question", "modality": "images by modality",
    "dataset": "images by data set", "entity": "masks by entity", "structure": "samples of I to IV by structure",
    "absent": "samples of I to IV by structure that is not in the image", "words": "questions by number of words",
    "area": "masks by share of their image", "licences": "images by licence", "warnings": "warnings of the builder",
}  # fmt: skip


def _table(counts: Mapping[str, int]) -> list[str]:
    total = sum(counts.values()) or 1
    lines = [f"  {name[:60]:60}{n:10}{n / total:8.1%}" for name, n in list(counts.items())[:_MAX_ROWS]]
    return lines + [f"  … and {len(counts) - _MAX_ROWS} more"] * (len(counts) > _MAX_ROWS) or ["  none"]


def plot(stats: Mapping, folder: str | os.PathLike) -> list[Path]:
    """Write a bar chart of each table of `statistics` to `folder`, as PNG; returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for key, title in TITLES.items():
        if stats[key]:
            written.append(folder / f"{key}.png")
            _bars(title, list(stats[key].items())[:_MAX_ROWS]).savefig(written[-1], dpi=120)
    return written


def _bars(title: str, counts: list[tuple[str, int]]) -> Figure:
    from matplotlib.figure import Figure  # here, because only charts need it and it takes long to import

    figure = Figure(figsize=(9, 1 + 0.24 * len(counts)), layout="constrained")
    axes = figure.subplots()
    names = [name if len(name) <= _MAX_LABEL else f"{name[: _MAX_LABEL - 1]}…" for name, _ in counts]
    bars = axes.barh(range(len(counts)), [n for _, n in counts], color=_BAR_COLOR)
    axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    axes.set_yticks(range(len(counts)), names, parse_math=False)
    axes.set_ylim(len(counts) - 0.4, -0.6)  # the first row at the top
    axes.set_xlim(0, 1.2 * max(1, *(n for _, n in counts)))  # leaves room for the number next to the longest bar
    axes.set_title(title, fontweight="bold")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.xaxis.set_visible(False)
    return figure
