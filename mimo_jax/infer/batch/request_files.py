"""The requests of a batch: every picture of a folder with one question, or the lines of a JSON-lines or CSV file.

Nothing here opens a picture. A line that is wrong is a request with a `fault`; it costs the others nothing.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mimo_jax.data.images.image import Window, kind_of, parse_window
from mimo_jax.errors import UserError
from mimo_jax.files import sha256
from mimo_jax.infer.engine.requests import MAX_TURNS

PROMPTS = ("points", "boxes", "scribbles", "mask", "prompts")
KEYS = ("id", "image", "question", *PROMPTS, "frame", "slice", "series", "window", "max_new_tokens")
_CELL = 2**24  # characters of a CSV cell; a mask's RLE is long
_ID = re.compile(r"\w[\w.-]*")
_ID_BYTES = 150  # file systems take 255, endings included
_STEM = 60  # characters of a file's name in an id made from it


@dataclass(frozen=True)
class BatchRequest:
    """One request as it is written; `fault`: why it cannot be asked. image: as written, path: where it lies. questions: of one
    conversation; `several`: they came as a list. prompts: of the first one, (name, what `read_prompts` takes). frame, slice, series,
    window: as `open_scan` takes them. line: of its file, None in a folder."""

    id: str
    image: str
    path: Path
    questions: tuple[str, ...] = ()
    several: bool = False
    prompts: tuple[tuple[str, Any], ...] = ()
    frame: int | str | None = None
    slice: str | None = None
    series: int | None = None
    window: Window = None
    max_new_tokens: int | None = None
    line: int | None = None
    fault: str = ""

    @property
    def whole(self) -> bool:
        """Every slice of a scan is asked."""
        return not self.fault and (self.frame == "all" or str(self.slice).lower().endswith("all") or self.path.is_dir())


class Survey(NamedTuple):
    """count: of all requests; faulty: of those that cannot be asked; first: the fault of the first of these. digest: SHA-256 of
    the request file, or of the folder's names and sizes."""

    count: int
    faulty: int
    first: str
    digest: str


class BatchRequests:
    """Requests in order, read anew whenever they are gone through: of a million of them, only the ids are kept meanwhile."""

    def __init__(self, source: str | os.PathLike, out: str | os.PathLike, defaults: Mapping[str, Any], volumes: bool = False):
        """source: a folder (all files below it, sorted; hidden ones and `out` left out), a .jsonl or a .csv. defaults: fields of
        KEYS for requests that do not say theirs; a folder's question. volumes: a folder in which DICOM files lie is one request, and
        of a NIfTI file every slice is asked, axial ones unless a slice says otherwise. UserError for what is none of these, or a
        wrong header."""
        self.source, self.out, self.volumes = Path(source), Path(out), volumes
        self.defaults = {key: value for key, value in defaults.items() if value is not None}
        self.folder = self.source if self.source.is_dir() else self.source.parent
        if not self.source.exists():
            raise UserError(f"{source}: no such file or folder")
        if self.source.is_dir():
            if not self.defaults.get("question"):
                raise UserError(f"{source}: is a folder; say what to ask of its pictures with --question")
            if self.out.resolve() == self.source.resolve():
                raise UserError(f"{out}: is the folder of the pictures; give another --out")
            self._entries = self._scans if volumes else self._files
        elif self.source.suffix.lower() == ".jsonl":
            self._entries = self._json_lines
        elif self.source.suffix.lower() == ".csv":
            self._header()
            self._entries = self._csv_rows
        else:
            raise UserError(f"{source}: give a folder, a .jsonl or a .csv")
        if volumes and not self.source.is_dir():
            raise UserError(f"{source}: names its scans itself, by folders or slice axial:all; leave --volumes away")

    def survey(self) -> Survey:
        """Go through all once: every check that needs no picture."""
        count, faulty, first = 0, 0, ""
        for request in self:
            count += 1
            faulty += bool(request.fault)
            first = first or request.fault
        return Survey(count, faulty, first, self._digest())

    def __iter__(self) -> Iterator[BatchRequest]:
        seen: dict[str, int] = {}
        for number, (line, fields) in enumerate(self._entries(), 1):
            try:
                if isinstance(fields, str):
                    raise UserError(fields)
                request = self._request(number, line, fields)
                if (key := request.id.casefold()) in seen:
                    raise UserError(f"id {request.id} is that of request {seen[key]} too; ids must differ, in more than case")
            except UserError as error:
                fields = fields if isinstance(fields, dict) else {}
                image = fields.get("image") if isinstance(fields.get("image"), str) else ""
                where = f"{self.source.name}, line {line}: " if line else ""
                request = BatchRequest(_made_id(number, image), image, self.folder / image, line=line, fault=f"{where}{error}")
                key = request.id.casefold()
            seen.setdefault(key, number)
            yield request

    def _digest(self) -> str:
        if not self.source.is_dir():
            return sha256(self.source)
        digest = hashlib.sha256(b"volumes" if self.volumes else b"")
        for _, fields in self._files():
            digest.update(f"{fields['image']}\0{(self.folder / fields['image']).lstat().st_size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _files(self) -> Iterator[tuple[None, dict]]:
        out = self.out.resolve()
        for folder, folders, names in os.walk(self.source, onerror=_raise):
            here = Path(folder)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and (here / name).resolve() != out)
            for name in sorted(names):
                if not name.startswith("."):
                    yield None, {"image": (here / name).relative_to(self.source).as_posix()}

    def _scans(self) -> Iterator[tuple[None, dict]]:
        for folder, files in itertools.groupby(self._files(), lambda entry: os.path.dirname(entry[1]["image"])):
            kinds = {fields["image"]: _kind(self.folder / fields["image"]) for _, fields in files}
            if "DICOM" in kinds.values():
                yield None, {"image": folder or "."}
            for image, kind in kinds.items():
                if kind != "DICOM":
                    yield None, {"image": image} | ({"slice": self.defaults.get("slice", "axial:all")} if kind == "NIfTI" else {})

    def _json_lines(self) -> Iterator[tuple[int, dict | str]]:
        with open(self.source, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except (ValueError, RecursionError) as error:
                    yield number, f"is not JSON ({error})"
                    continue
                yield number, fields if isinstance(fields, dict) else "is no JSON object"

    def _header(self) -> list[str]:
        with open(self.source, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            header = [name.strip() for name in next(csv.reader(file), [])]
        for name in header:
            if name not in KEYS:
                raise UserError(f"{self.source}, header: {_unknown(name)}")
            if header.count(name) > 1:
                raise UserError(f"{self.source}, header: {name} comes twice")
        return header

    def _csv_rows(self) -> Iterator[tuple[int, dict | str]]:
        header = self._header()
        with open(self.source, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.reader(file)
            next(rows, None)
            while True:
                line = rows.line_num + 1
                try:
                    cells = _next_row(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield line, f"cannot be read ({error})"
                    continue
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) > len(header):
                    yield line, f"has {len(cells)} cells, the header {len(header)}; put cells with commas into quotation marks"
                    continue
                try:
                    yield line, {name: _cell(name, cell) for name, cell in zip(header, cells, strict=False) if cell.strip()}
                except UserError as error:
                    yield line, str(error)

    def _request(self, number: int, line: int | None, fields: dict) -> BatchRequest:
        """UserError says what is wrong with it."""
        for key in fields:
            if key not in KEYS:
                raise UserError(_unknown(key))
        fields = self.defaults | {key: value for key, value in fields.items() if value is not None}
        image = fields.get("image")
        if not isinstance(image, str) or not image or "\0" in image:
            raise UserError("image: is missing; give the path of a picture")
        path = self.folder / image
        if not os.path.exists(path):
            raise UserError(f"image {image}: no such file or folder")
        questions = fields.get("question")
        several = isinstance(questions, list)
        questions = tuple(questions) if several else (questions,)
        if not 1 <= len(questions) <= MAX_TURNS or not all(isinstance(q, str) and q.strip() for q in questions):
            raise UserError(f"question: is missing or empty; give a text, or a list of 1 to {MAX_TURNS} as the turns of a conversation")
        return BatchRequest(
            id=_id(fields["id"]) if "id" in fields else _made_id(number, image),
            image=image,
            path=path,
            questions=questions,
            several=several,
            prompts=tuple(self._prompts(fields)),
            frame="all" if fields.get("frame") == "all" else _whole(fields.get("frame"), "frame", 0),
            slice=_text(fields.get("slice"), "slice", "AXIS:INDEX, such as axial:30"),
            series=_whole(fields.get("series"), "series", 1),
            window=_window(fields.get("window")),
            max_new_tokens=_whole(fields.get("max_new_tokens"), "max_new_tokens", 1),
            line=line,
        )

    def _prompts(self, fields: dict) -> Iterator[tuple[str, Any]]:
        """Points, boxes and scribbles as one source; a mask and prompts each as their own, paths relative to the request file."""
        if own := {key: fields[key] for key in ("points", "boxes", "scribbles") if key in fields}:
            yield "prompts", own
        for key in ("mask", "prompts"):
            source = fields.get(key)
            if isinstance(source, str):
                if "\0" in source or not os.path.isfile(self.folder / source):
                    raise UserError(f"{key} {source}: no such file")
                yield f"{key} {source}", self.folder / source
            elif isinstance(source, dict):
                yield key, source
            elif source is not None:
                raise UserError(f"{key}: give the path of a file or an object")


def _next_row(rows: Iterator[list[str]]) -> list[str]:
    """The next row of a CSV reader, with cells of up to _CELL characters; the module's own limit, which is the process's, stays."""
    limit = csv.field_size_limit(_CELL)
    try:
        return next(rows)
    finally:
        csv.field_size_limit(limit)


def _raise(error: OSError) -> None:
    raise error  # a folder that may not be read would be passed over without a word


def _kind(path: Path) -> str:
    try:
        return kind_of(path)
    except UserError:  # its request says so
        return "picture"


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key[:40], KEYS, 1)
    return f"{key[:40]!r} is unknown; {f'did you mean {near[0]}?' if near else 'use ' + ', '.join(KEYS)}"


def _id(value: Any) -> str:
    """An id that is a file's name in the folder of answers and cannot be more."""
    name = str(value) if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)) else ""
    if not _ID.fullmatch(name) or len(name.encode(errors="replace")) > _ID_BYTES:
        raise UserError(f"id {str(value)[:40]!r}: give letters, digits, '_', '-' and '.', not '.' or '-' first, at most {_ID_BYTES} bytes")
    return name


def _made_id(number: int, image: str) -> str:
    """The running number, and as much of the file's name, up to its endings, as an id may hold."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(image).name.split(".")[0])[:_STEM].strip("_")
    return f"{number:05d}-{stem}" if stem else f"{number:05d}"


def _cell(name: str, cell: str) -> Any:
    """A cell of a table: JSON where it begins so, a whole number where one is meant, else text."""
    try:
        cell.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name}: is not UTF-8; save the table as UTF-8") from None
    cell = cell.strip()
    if cell[0] in "[{":
        try:
            return json.loads(cell)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{name}: is not JSON ({error})") from None
    return int(cell) if name in ("frame", "series", "max_new_tokens") and cell.isdecimal() and len(cell) < 10 else cell


def _whole(value: Any, name: str, least: int) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not least <= value < 10**9):
        raise UserError(f"{name}: give a whole number of {least} or more")
    return value


def _text(value: Any, name: str, form: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{name}: give {form}")
    return value


def _window(value: Any) -> Window:
    if isinstance(value, list | tuple):
        if len(value) != 2 or not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9 for v in value):
            raise UserError("window: give [low, high] or a name")
        return float(value[0]), float(value[1])
    text = _text(value, "window", "LOW,HIGH or a name")
    try:
        return None if text is None else parse_window(text)
    except UserError as error:
        raise UserError(f"window: {error}") from None
