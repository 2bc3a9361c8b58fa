"""Statistics of a record folder, as a paper reports them: counts, lengths of questions and areas of masks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from mimo_jax.data.records import RecordFolder, read_info

WORDS = (0, 4, 6, 8, 10, 15, 20, 40)  # words of a user turn; lower edges of the bins
AREAS = (0.0, 0.0001, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5)  # area of a mask as a share of its image; lower edges of the bins
_MAX_ROWS = 30  # maximum number of bars of a plot and lines of a table
_BACKGROUND, _TEXT, _BAR = (255, 255, 255), (30, 30, 35), (60, 120, 190)


def statistics(folder: str | os.PathLike, progress: bool = True) -> dict:
    """Counts of a record folder by split, and over all of it by perspective, modality, data set, entity, kind of question,
    length of a question in words, and area of a mask. Reads every record; raises DataError for one that cannot be read."""
    names = ("images", "groups", "masks", "samples")
    splits: dict[str, dict] = {}
    by: dict[str, Counter] = {key: Counter() for key in ("perspective", "modality", "dataset", "entity", "kind", "words", "area")}
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
    head = f"{'':8}{'images':>10}{'groups':>10}{'masks':>10}{'samples':>10}"
    rows = [f"{name:8}" + "".join(f"{n:10}" for n in row.values()) for name, row in {**stats["splits"], "all": stats["all"]}.items()]
    lines = [head, *rows]
    for key, title in TITLES.items():
        lines += ["", title, *_table(stats[key])]
    return "\n".join(lines)


TITLES = {
    "perspective": "samples by perspective", "kind": "samples by kind of question", "modality": "images by modality",
    "dataset": "images by data set", "entity": "masks by entity", "words": "questions by number of words",
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
            _bars(title, list(stats[key].items())[:_MAX_ROWS]).save(written[-1])
    return written


def _bars(title: str, counts: list[tuple[str, int]]) -> Image.Image:
    row, label, width = 22, 330, 420
    font = ImageFont.load_default(size=14.0)
    chart = Image.new("RGB", (label + width + 90, row * (len(counts) + 2)), _BACKGROUND)
    draw = ImageDraw.Draw(chart)
    draw.text((10, 6), title, fill=_TEXT, font=ImageFont.load_default(size=16.0))
    largest = max(n for _, n in counts) or 1
    for i, (name, n) in enumerate(counts):
        y = row * (i + 1) + 12
        name = name if font.getlength(name) <= label - 20 else f"{name[:44]}…"
        draw.text((label - 8, y), name, fill=_TEXT, font=font, anchor="ra")
        draw.rectangle((label, y, label + max(1, round(width * n / largest)), y + row - 7), fill=_BAR)
        draw.text((label + width * n / largest + 6, y), f"{n}", fill=_TEXT, font=font)
    return chart
