"""The output folder of a batch job.

OUT/windows/        while the job runs: one file per window of requests, FIRST-LAST_ANSWERED_FAILED.json, with its lines of the two
                    files below. A window counts once its file is closed, so that a lost machine loses the current window at most, also
                    on a bucket, where a file that is not closed does not exist
OUT/answers.jsonl   one line per request that was answered, in the order of the requests; written when the job ends or is stopped
OUT/failed.jsonl    one line per request that failed, or whose files could not be saved: {"id", "file", "line"?, "reason"}
OUT/ID.png, …       the files saved for each answer; for the second turn of a conversation ID@2.png, and so on
OUT/summary.csv     one row per segmented structure, written at the end
OUT/warnings.jsonl  one line per image with warnings: {"image", "warnings"}, those of `Answer.warnings`; written with answers.jsonl
OUT/batch.json      the definition of the job, and at its end the numbers of its requests; the windows are then removed
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mimo_jax import files
from mimo_jax.errors import UserError
from mimo_jax.infer.answers.answer import NO_MASKS

ANSWERS, FAILED, SUMMARY, STATE, WINDOWS = "answers.jsonl", "failed.jsonl", "summary.csv", "batch.json", "windows"
WARNINGS = "warnings.jsonl"
COLUMNS = (
    *("id", "image", "question", "phrase", "entity", "area_px", "area_mm2", "box"),  # area and box only for images
    *("voxels", "volume_mm3", "slices", "score", "uncertain"),  # the first three only for volumes
)
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet evaluates a cell that starts with one of these


disk_errors = partial(files.disk_errors, remedy="fix that and run the same command with --resume")


class _Window(NamedTuple):
    """The file of a window: its requests first + 1 … last, and the numbers of them that were answered and failed."""

    first: int
    last: int
    answered: int
    failed: int

    @property
    def file(self) -> str:
        return f"{self.first + 1:09d}-{self.last:09d}_{self.answered}_{self.failed}.json"

    @staticmethod
    def of(name: str) -> _Window | None:
        """Inverse of `file`; None for another name."""
        found = re.fullmatch(r"(\d+)-(\d+)_(\d+)_(\d+)\.json", name)
        return _Window(int(found[1]) - 1, *map(int, found.groups()[1:])) if found else None


class BatchJob:
    """The output folder with the definition and progress of its job."""

    def __init__(self, out: Path, about: dict[str, Any], resume: bool):
        """about: the definition of the job, except the checkpoint. Raises UserError, with nothing written, if the job cannot start or
        resume in `out`."""
        self.out, self.resume = out, resume
        self.about = json.loads(json.dumps(about))
        existing = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"{out}: cannot be written; give another --out")
        self.state = self._load_state()

    @property
    def done(self) -> int:
        """Number of requests, from the first on, whose lines are all written."""
        return self.state["done"]

    @property
    def answered(self) -> int:
        return self.state["answered"]

    @property
    def failed(self) -> int:
        return self.state["failed"]

    def _load_state(self) -> dict[str, Any]:
        new = {"about": self.about, "origin": None, "done": 0, "answered": 0, "failed": 0, "bytes": {}}
        self._windows: list[_Window] = []
        if not self.out.exists() or all(name == files.LOCK or files.is_partial(name) for name in os.listdir(self.out)):
            return new
        try:
            state = json.loads((self.out / STATE).read_bytes())
            about = state["about"]
            lacking = [name for name, size in state["bytes"].items() if size and (self.out / name).stat().st_size < size]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            lacking = [STATE]
        if lacking or state.keys() != new.keys() or state["done"] not in (0, about.get("count")):
            raise UserError(f"{self.out}: contains other files and no job that can be resumed; give another --out")
        if not state["done"]:  # the job has not ended
            self._windows = self._complete_windows()
            state["done"] = self._windows[-1].last if self._windows else 0
            state["answered"], state["failed"] = (sum(getattr(w, name) for w in self._windows) for name in ("answered", "failed"))
        if differing := sorted(key for key in about.keys() | self.about.keys() if about.get(key) != self.about.get(key)):
            raise UserError(f"{self.out}: contains another job ({', '.join(differing)} differ); give another --out")
        if not self.resume:
            done = f"{state['done']} of {about['count']} requests done"
            raise UserError(f"{self.out}: contains this job, {done}; add --resume, or give another --out")
        return state

    def _complete_windows(self) -> list[_Window]:
        """The windows from the first request on without a gap, up to the last one whose file is whole."""
        folder = self.out / WINDOWS
        found = {window.first: window for name in (os.listdir(folder) if folder.is_dir() else ()) if (window := _Window.of(name))}
        chain: list[_Window] = []
        while (first := chain[-1].last if chain else 0) in found:
            chain.append(found[first])
        while chain and files.read_json(folder / chain[-1].file) is None:  # written while the machine was lost
            chain.pop()
        return chain

    def claim(self, origin: str) -> BatchJob:
        """Lock the folder for this process; origin: the description of the checkpoint."""
        self._lock = files.claimed(self.out, self.out)
        self.state = self._load_state()
        if self.state["origin"] not in (None, origin):
            started = self.state["origin"]
            raise UserError(f"{self.out}: was started with {started}, this is {origin}; give that --checkpoint, or another --out")
        self.state["origin"] = origin
        with disk_errors(self.out):
            (self.out / WINDOWS).mkdir(exist_ok=True)
            for part in (*self.out.glob(".*.part"), *(self.out / WINDOWS).glob(".*.part")):  # files that a killed process was writing
                part.unlink()
            kept = {window.file for window in self._windows}
            for name in set(os.listdir(self.out / WINDOWS)) - kept:  # after a gap
                (self.out / WINDOWS / name).unlink()
            files.write_json(self.out / STATE, self.state | {"done": 0, "answered": 0, "failed": 0}, durable=True)
        return self

    def __enter__(self) -> BatchJob:
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):
            self._lock.close()

    def append(self, answers: Sequence[dict], failures: Sequence[dict], requests: int) -> None:
        """Write a window of `requests` requests; they count once its file is on the disk."""
        failed = len({failure["id"] for failure in failures})
        window = _Window(self.done, self.done + requests, len(answers), failed)
        with disk_errors(self.out):
            files.write_json(self.out / WINDOWS / window.file, {ANSWERS: answers, FAILED: failures}, durable=True)
        self._windows.append(window)
        self.state |= {"done": window.last, "answered": self.answered + len(answers), "failed": self.failed + failed}

    def join_windows(self) -> None:
        """Write the lines of all windows so far to answers.jsonl and failed.jsonl, and the warnings among them to warnings.jsonl."""
        with disk_errors(self.out):
            for name in (ANSWERS, FAILED):
                with files.atomic_write(self.out / name, durable=True) as part, open(part, "w", encoding="utf-8") as file:
                    for window in self._windows:
                        lines = json.loads((self.out / WINDOWS / window.file).read_bytes())[name]
                        file.writelines(json.dumps(line) + "\n" for line in lines)
        write_warnings(self.out)

    def end(self) -> None:
        """Write all files of a job whose requests are all done, record its end, and remove the windows."""
        if self._windows:
            self.join_windows()
        write_summary(self.out)
        with disk_errors(self.out):
            self.state["bytes"] = {name: (self.out / name).stat().st_size for name in (ANSWERS, FAILED)}
            files.write_json(self.out / STATE, self.state, durable=True)
            shutil.rmtree(self.out / WINDOWS, ignore_errors=True)


def write_summary(out: Path) -> None:
    """Write summary.csv from answers.jsonl: one row per segmented structure with the columns COLUMNS, one per structure that was asked
    for and not answered, and a row that says so for an answer without masks. box: x0,y0,x1,y1, half-open; slices: the first and the
    last."""
    with disk_errors(out), files.atomic_write(out / SUMMARY) as part:
        with open(out / ANSWERS, encoding="utf-8") as answers, open(part, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(COLUMNS)
            for answer in map(json.loads, answers):
                for turn in answer.get("turns", [answer]):
                    head = (answer["id"], answer["image"], turn["question"])
                    entities = turn.get("entities", turn.get("structures"))
                    rows.writerows(_row(*head, entity) for entity in entities)
                    left_out = [f"{name} (not answered)" for name in turn.get("unanswered", ())]
                    rows.writerows(map(_cell, (*head, name, *[""] * (len(COLUMNS) - 4))) for name in left_out)
                    if not entities:
                        rows.writerow(map(_cell, (*head, NO_MASKS, *[""] * (len(COLUMNS) - 4))))


def write_warnings(out: Path) -> None:
    """Write warnings.jsonl from answers.jsonl: the different warnings of the answers about each image."""
    found: dict[str, dict[str, None]] = {}
    with disk_errors(out), files.atomic_write(out / WARNINGS) as part:
        with open(out / ANSWERS, encoding="utf-8") as answers, open(part, "w", encoding="utf-8") as file:
            for answer in map(json.loads, answers):
                for turn in answer.get("turns", [answer]):
                    if lines := turn.get("warnings"):
                        found.setdefault(answer["image"], {}).update(dict.fromkeys(lines))
            file.writelines(json.dumps({"image": image, "warnings": list(lines)}) + "\n" for image, lines in found.items())


def _row(id: str, image: str, question: str, entity: dict) -> Iterator[str]:
    shown = {name: entity.get(name, "") for name in COLUMNS} | {"id": id, "image": image, "question": question}
    shown["phrase"] = entity["phrase"] or "unnamed"
    shown["box"] = ",".join(map(str, entity.get("box_xyxy") or []))
    shown["slices"] = "-".join(map(str, entity.get("slices") or []))
    shown["uncertain"] = "yes" if entity["uncertain"] else "no"
    return map(_cell, shown.values())


def _cell(value: Any) -> str:
    """The text of a cell, escaped so that a spreadsheet does not evaluate it as a formula."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return f"'{text}" if isinstance(value, str) and text.startswith(_FORMULA_STARTS) else text
