"""The output folder of a batch job.

OUT/answers.jsonl   one line per request that was answered, in the order of the requests
OUT/failed.jsonl    one line per request that failed, or whose files could not be saved: {"id", "file", "line"?, "reason"}
OUT/ID.png, …       the files saved for each answer; for the second turn of a conversation ID@2.png, and so on
OUT/summary.csv     one row per segmented structure, written at the end
OUT/batch.json      the definition of the job and its progress; lines beyond that progress are truncated when the job resumes
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from mimo_jax import files
from mimo_jax.errors import UserError
from mimo_jax.infer.answers.answer import NO_MASKS

ANSWERS, FAILED, SUMMARY, STATE = "answers.jsonl", "failed.jsonl", "summary.csv", "batch.json"
COLUMNS = (
    *("id", "image", "question", "phrase", "entity", "area_px", "area_mm2", "box"),  # area and box only for images
    *("voxels", "volume_mm3", "slices", "score", "uncertain"),  # the first three only for volumes
)
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet evaluates a cell that starts with one of these


disk_errors = partial(files.disk_errors, remedy="fix that and run the same command with --resume")


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
        new = {"about": self.about, "origin": None, "done": 0, "answered": 0, "failed": 0, "bytes": {ANSWERS: 0, FAILED: 0}}
        if not self.out.exists() or all(name == files.LOCK or files.is_partial(name) for name in os.listdir(self.out)):
            return new
        try:
            state = json.loads((self.out / STATE).read_bytes())
            done, about = state["done"], state["about"]
            lacking = [name for name, size in state["bytes"].items() if size and (self.out / name).stat().st_size < size]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            lacking = [STATE]
        if lacking or state.keys() != new.keys():
            raise UserError(f"{self.out}: contains other files and no job that can be resumed; give another --out")
        if differing := sorted(key for key in about.keys() | self.about.keys() if about.get(key) != self.about.get(key)):
            raise UserError(f"{self.out}: contains another job ({', '.join(differing)} differ); give another --out")
        if not self.resume:
            raise UserError(f"{self.out}: contains this job, {done} of {about['count']} requests done; add --resume, or give another --out")
        return state

    def claim(self, origin: str) -> BatchJob:
        """Lock the folder for this process and open its files; origin: the description of the checkpoint."""
        self._lock = files.claimed(self.out, self.out)
        self.state = self._load_state()
        if self.state["origin"] not in (None, origin):
            started = self.state["origin"]
            raise UserError(f"{self.out}: was started with {started}, this is {origin}; give that --checkpoint, or another --out")
        self.state["origin"] = origin
        for part in self.out.glob(".*.part"):  # files that a killed process was writing
            part.unlink()
        self._save_state()
        self._files = {name: self._open_truncated(name) for name in (ANSWERS, FAILED)}
        return self

    def _open_truncated(self, name: str) -> IO[bytes]:
        """Open a JSON-lines file for appending, truncated to its last complete window."""
        file = open(self.out / name, "ab")
        file.truncate(self.state["bytes"][name])
        return file

    def __enter__(self) -> BatchJob:
        return self

    def __exit__(self, *_) -> None:
        for file in (*self._files.values(), self._lock):
            with contextlib.suppress(OSError):  # data that a full disk could not take is truncated when the job resumes
                file.close()

    def append(self, answers: Sequence[dict], failures: Sequence[dict], requests: int) -> None:
        """Append the lines of a window of `requests` requests; they count once all of them are on the disk."""
        with disk_errors(self.out):
            for name, lines in ((ANSWERS, answers), (FAILED, failures)):
                self._files[name].write("".join(json.dumps(line) + "\n" for line in lines).encode())
                self._files[name].flush()
                os.fsync(self._files[name].fileno())
                self.state["bytes"][name] = self._files[name].tell()
            self.state["done"] += requests
            self.state["answered"] += len(answers)
            self.state["failed"] += len({failure["id"] for failure in failures})
            self._save_state()

    def _save_state(self) -> None:
        files.write_json(self.out / STATE, self.state, durable=True)


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
