"""The tables of the paper from the reports of a sweep of configs/ablations.py: mIoU by perspective, AP50 by modality, and mIoU by share of
the training data.

A cell is the mean ± standard deviation over seeds, or of a single seed the value with its 95 % interval over patients or cases. Figures
of others come from a CSV file with the columns table, model, column, value and address, where the address is that of the page on which
the value was read.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mimo_jax import files
from mimo_jax.errors import UserError
from mimo_jax.eval.mask_metrics import GROUNDED

PERSPECTIVE_TABLE, AP50_TABLE, DATA_TABLE = TABLES = ("miou", "ap50", "data")
TITLES = {
    PERSPECTIVE_TABLE: "mIoU by perspective",
    AP50_TABLE: "AP50 by modality, without and with a prompt",
    DATA_TABLE: "mIoU by perspective and share of the training data",
}
SAM_BOX = "SAM, box prompts"
MODELS = {"MIMO without aligner": "none", "MIMO": "cross_attention"}  # row -> variant of the group "aligner"
SHARES = ("25", "50", "75", "100")  # variants of the group "data"
_COLUMNS = ("table", "model", "column", "value", "address")


@dataclass(frozen=True)
class PeerFigure:
    """A figure that others published, and the address where it was read."""

    table: str
    model: str
    column: str
    value: float
    address: str


@dataclass
class PaperTable:
    """Rows of cells by column."""

    title: str
    columns: list[str]
    rows: dict[str, dict[str, str]] = field(default_factory=dict)


def read_peers(path: Path) -> list[PeerFigure]:
    """The figures of a CSV file. Raises UserError, which names the line, for a figure without an address, of an unknown table, or that is
    no number."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            if missing := [name for name in _COLUMNS if name not in (lines.fieldnames or ())]:
                raise UserError(f"{path}: has no column {missing[0]}; its columns are {', '.join(_COLUMNS)}")
            return [_peer(f"{path}, line {lines.line_num}", line) for line in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a CSV file") from None


def _peer(where: str, line: Mapping[str, str | None]) -> PeerFigure:
    values = {name: (line[name] or "").strip() for name in _COLUMNS}
    if values["table"] not in TABLES:
        raise UserError(f"{where}: table is {values['table']!r}; use one of {', '.join(TABLES)}")
    if not values["address"].startswith(("http://", "https://")):
        raise UserError(f"{where}: address is {values['address']!r}; give the address of the page where the value was read")
    try:
        value = float(values["value"])
    except ValueError:
        raise UserError(f"{where}: value is {values['value']!r}; give a number") from None
    return PeerFigure(values["table"], values["model"], values["column"], value, values["address"])


def read_sam_box(path: Path, data: str, split: str, limit: int | None) -> dict:
    """The report of `mimo eval --sam-box`. Raises UserError if it is none, or of other samples than those of the sweep."""
    report = files.read_json(path)
    if not report or "method" not in report:
        raise UserError(f"{path}: is no report of mimo eval --sam-box")
    for name, wanted in (("data", data), ("split", split), ("limit", limit)):
        made = str(files.absolute(report[name])) if name == "data" else report[name]
        if made != wanted:
            raise UserError(f"{path}: was made with {name} {made}, the sweep has {wanted}; run mimo eval --sam-box with that")
    return report


def paper_tables(
    groups: Mapping[str, Mapping[str, Sequence[str]]],
    reports: Mapping[str, dict],
    peers: Sequence[PeerFigure] = (),
    sam_box: dict | None = None,
) -> tuple[list[PaperTable], list[str]]:
    """(tables, why others are missing). groups: group → variant → names of its runs; reports: name of a finished run → its report;
    sam_box: the report of `mimo eval --sam-box`, a row of the tables of mIoU and AP50."""
    tables, missing = [], []
    addresses = list(dict.fromkeys(peer.address for peer in peers))
    for name in TABLES:
        group, variants = ("data", {f"{share} %": share for share in SHARES}) if name == DATA_TABLE else ("aligner", MODELS)
        found = {
            row: [reports[run] for run in groups.get(group, {}).get(variant, ()) if run in reports] for row, variant in variants.items()
        }
        if absent := [variant for row, variant in variants.items() if not found[row]]:
            missing.append(f"{TITLES[name]}: needs finished runs of {', '.join(f'{group}/{variant}' for variant in absent)}")
        if not any(found.values()):
            continue
        metric = "ap50_by_modality" if name == AP50_TABLE else "miou"
        columns = [*GROUNDED] if name != AP50_TABLE else list(dict.fromkeys(c for of in found.values() for r in of for c in r[metric]))
        table = PaperTable(TITLES[name], columns)
        for peer in (peer for peer in peers if peer.table == name):
            if peer.column not in table.columns:
                table.columns.append(peer.column)
            table.rows.setdefault(peer.model, {})[peer.column] = f"{peer.value:.3f} [{addresses.index(peer.address) + 1}]"
        for row, of_row in (({SAM_BOX: [sam_box]} if sam_box and name != DATA_TABLE else {}) | found).items():
            table.rows[row] = {column: _cell(of_row, metric, column) for column in columns}
        tables.append(table)
    return tables, missing


def markdown(about: str, tables: Sequence[PaperTable], missing: Sequence[str], peers: Sequence[PeerFigure] = ()) -> str:
    """The tables as Markdown, AP50 with a row for each modality, and the addresses of the figures of others."""
    lines = [
        about,
        "",
        "Mean ± standard deviation of the seeds; of a single seed, the value with its 95 % interval over patients or cases.",
    ]
    for table in tables:
        lines += ["", f"**{table.title}**", ""]
        if table.title == TITLES[AP50_TABLE]:
            heads, sides = list(table.rows), table.columns
            cells = {side: [table.rows[head].get(side, "-") for head in heads] for side in sides}
        else:
            heads, sides = table.columns, list(table.rows)
            cells = {side: [table.rows[side].get(head, "-") for head in heads] for side in sides}
        lines += [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
        lines += [f"| {side} | {' | '.join(cells[side])} |" for side in sides]
    for reason in missing:
        lines += ["", f"{reason}"]
    for number, address in enumerate(dict.fromkeys(peer.address for peer in peers), 1):
        lines += ["", f"[{number}] published, not measured here; read at {address}"]
    return "\n".join(lines) + "\n"


def _cell(reports: Sequence[dict], metric: str, column: str) -> str:
    values = [value for report in reports if (value := report[metric].get(column)) is not None]
    if not values:
        return "-"
    if len(values) > 1:
        return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"
    bounds = next(bounds for report in reports if (bounds := report["intervals"][metric].get(column)))
    return f"{values[0]:.3f} ({bounds[0]:.3f} … {bounds[1]:.3f})"
