"""The folder of answers of a batch.

OUT/answers.jsonl   one line for each request that was answered, in the order of the requests
OUT/failed.jsonl    one line for each that was not, or whose files were not: {"id", "file", "line"?, "reason"}
OUT/ID.png, …       what is saved for each answer; of the second turn of a conversation ID@2.png, and so on
OUT/summary.csv     one row for each painted structure, made at the end
OUT/batch.json      what the job is, and how far it is: lines that it does not count are cut off when the job goes on
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
from mimo_jax.infer.answers.answer import NOTHING_PAINTED

ANSWERS, FAILED, SUMMARY, STATE = "answers.jsonl", "failed.jsonl", "summary.csv", "batch.json"
COLUMNS = (
    *("id", "image", "question", "phrase", "entity", "area_px", "area_mm2", "box"),  # of a picture
    *("voxels", "volume_mm3", "slices", "score", "uncertain"),  # of a scan, and of both
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # with which a spreadsheet would begin to compute


disk_errors = partial(files.disk_errors, remedy="mend that and run the same command with --resume")


class BatchJob:
    """The folder of answers: what job it holds and how far it is."""

    def __init__(self, out: Path, about: dict[str, Any], resume: bool):
        """about: what makes the job what it is, all but the checkpoint. UserError, with nothing written, where it cannot go on."""
        self.out, self.resume = out, resume
        self.about = json.loads(json.dumps(about))
        there = next(place for place in (out, *out.absolute().parents) if place.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise UserError(f"{out}: cannot be written; give another --out")
        self.state = self._found()

    @property
    def done(self) -> int:
        """Requests, from the first on, whose lines are all written."""
        return self.state["done"]

    @property
    def answered(self) -> int:
        return self.state["answered"]

    @property
    def failed(self) -> int:
        return self.state["failed"]

    def _found(self) -> dict[str, Any]:
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
            raise UserError(f"{self.out}: holds other files and no job that could go on; give another --out")
        if differing := sorted(key for key in about.keys() | self.about.keys() if about.get(key) != self.about.get(key)):
            raise UserError(f"{self.out}: holds another job ({', '.join(differing)} differ); give another --out")
        if not self.resume:
            raise UserError(f"{self.out}: holds this job, {done} of {about['count']} requests done; add --resume, or give another --out")
        return state

    def writing(self, origin: str) -> BatchJob:
        """Claim the folder for this process; origin: of the checkpoint."""
        self._lock = files.claimed(self.out, self.out)
        self.state = self._found()
        if self.state["origin"] not in (None, origin):
            begun = self.state["origin"]
            raise UserError(f"{self.out}: was begun with {begun}, this is {origin}; give that --checkpoint, or another --out")
        self.state["origin"] = origin
        for part in self.out.glob(".*.part"):  # of files that a killed process was writing
            part.unlink()
        self._keep()
        self._files = {name: self._whole(name) for name in (ANSWERS, FAILED)}
        return self

    def _whole(self, name: str) -> IO[bytes]:
        """A file of lines, without what no window was finished with."""
        file = open(self.out / name, "ab")
        file.truncate(self.state["bytes"][name])
        return file

    def __enter__(self) -> BatchJob:
        return self

    def __exit__(self, *_) -> None:
        for file in (*self._files.values(), self._lock):
            with contextlib.suppress(OSError):  # of what a full disk did not take, which is cut off later
                file.close()

    def append(self, answers: Sequence[dict], failures: Sequence[dict], requests: int) -> None:
        """The lines of a window of so many requests; they count once all of them are on the disk."""
        with disk_errors(self.out):
            for name, lines in ((ANSWERS, answers), (FAILED, failures)):
                self._files[name].write("".join(json.dumps(line) + "\n" for line in lines).encode())
                self._files[name].flush()
                os.fsync(self._files[name].fileno())
                self.state["bytes"][name] = self._files[name].tell()
            self.state["done"] += requests
            self.state["answered"] += len(answers)
            self.state["failed"] += len({failure["id"] for failure in failures})
            self._keep()

    def _keep(self) -> None:
        files.write_json(self.out / STATE, self.state, durable=True)


def write_summary(out: Path) -> None:
    """summary.csv from answers.jsonl: COLUMNS, one row for each painted structure, and one that says so for an answer that paints
    nothing. box: x0,y0,x1,y1, half-open; slices: the first and the last."""
    with disk_errors(out), files.atomic_write(out / SUMMARY) as part:
        with open(out / ANSWERS, encoding="utf-8") as answers, open(part, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(COLUMNS)
            for answer in map(json.loads, answers):
                for turn in answer.get("turns", [answer]):
                    head = (answer["id"], answer["image"], turn["question"])
                    painted = turn.get("entities", turn.get("structures"))
                    rows.writerows(_row(*head, entity) for entity in painted)
                    if not painted:
                        rows.writerow(map(_cell, (*head, NOTHING_PAINTED, *[""] * (len(COLUMNS) - 4))))


def _row(id: str, image: str, question: str, entity: dict) -> Iterator[str]:
    shown = {name: entity.get(name, "") for name in COLUMNS} | {"id": id, "image": image, "question": question}
    shown["phrase"] = entity["phrase"] or "unnamed"
    shown["box"] = ",".join(map(str, entity.get("box_xyxy") or []))
    shown["slices"] = "-".join(map(str, entity.get("slices") or []))
    shown["uncertain"] = "yes" if entity["uncertain"] else "no"
    return map(_cell, shown.values())


def _cell(value: Any) -> str:
    """Text that a spreadsheet takes for text, whatever a question or a file's name begins with."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    return f"'{text}" if isinstance(value, str) and text.startswith(_FORMULA) else text
