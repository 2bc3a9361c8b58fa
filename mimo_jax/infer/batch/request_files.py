"""Read the requests of a batch: every image of a folder with one question, or the lines of a JSON-lines or CSV file.

No image is opened here. An invalid line becomes a request with a `fault` and does not affect the others.
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

from mimo_jax.data.images.image import Window, file_kind, local_path, parse_window
from mimo_jax.data.mask_levels import parse_threshold
from mimo_jax.errors import UserError
from mimo_jax.files import sha256
from mimo_jax.infer.engine.requests import MAX_TURNS

PROMPTS = ("points", "boxes", "scribbles", "mask", "prompts")
KEYS = ("id", "image", "question", *PROMPTS, "frame", "slice", "series", "window", "mask_threshold", "max_new_tokens")
_MAX_CELL = 2**24  # characters in a CSV cell; the RLE of a mask is long
_ID = re.compile(r"\w[\w.-]*")
_MAX_ID_BYTES = 150  # file systems allow 255, including the endings
_MAX_STEM = 60  # characters of the file name in a default id


@dataclass(frozen=True)
class BatchRequest:
    """One request of the source.

    fault: why it is invalid, or "". image: path as written; path: resolved path. questions: the turns of one conversation; multi_turn:
    they were given as a list. prompts: those of the first question, as (name, argument of `read_prompts`). frame, slice, series, window:
    see `open_scan`. line: its line in the file, None for a folder."""

    id: str
    image: str
    path: Path
    questions: tuple[str, ...] = ()
    multi_turn: bool = False
    prompts: tuple[tuple[str, Any], ...] = ()
    frame: int | str | None = None
    slice: str | None = None
    series: int | None = None
    window: Window = None
    mask_threshold: float | None = None  # see `read_prompts`
    max_new_tokens: int | None = None
    line: int | None = None
    fault: str = ""

    @property
    def is_volume(self) -> bool:
        """Whether the question is asked about every slice of a volume."""
        return not self.fault and (self.frame == "all" or str(self.slice).lower().endswith("all") or self.path.is_dir())


class Survey(NamedTuple):
    """count: number of requests; faulty: number of invalid requests; first: the fault of the first of these. digest: SHA-256 of the
    request file, or of the folder's file names and sizes."""

    count: int
    faulty: int
    first: str
    digest: str


class BatchRequests:
    """The requests of a source in order. Every iteration reads the source again; only the ids are kept in memory."""

    def __init__(self, source: str | os.PathLike, out: str | os.PathLike, defaults: Mapping[str, Any], volumes: bool = False):
        """source: a folder (all files below it, sorted, without hidden files and `out`), a .jsonl or a .csv. defaults: fields of KEYS for
        requests without their own. volumes: a folder that contains DICOM files is one request, and every slice of a NIfTI file is asked
        about, along the axial axis unless `slice` names another. Raises UserError for other sources and for an invalid header."""
        self.source, self.out, self.volumes = Path(source), Path(out), volumes
        self.defaults = {key: value for key, value in defaults.items() if value is not None}
        self.folder = self.source if self.source.is_dir() else self.source.parent
        if not self.source.exists():
            raise UserError(f"{source}: no such file or folder")
        if self.source.is_dir():
            if not self.defaults.get("question"):
                raise UserError(f"{source}: is a folder; give the question about its images with --question")
            if self.out.resolve() == self.source.resolve():
                raise UserError(f"{out}: is the folder of the images; give another --out")
            self._entries = self._scans if volumes else self._files
        elif self.source.suffix.lower() == ".jsonl":
            self._entries = self._json_lines
        elif self.source.suffix.lower() == ".csv":
            self._header()
            self._entries = self._csv_rows
        else:
            raise UserError(f"{source}: give a folder, a .jsonl or a .csv")
        if volumes and not self.source.is_dir():
            raise UserError(f"{source}: names its volumes itself, by folders or slice axial:all; omit --volumes")

    def survey(self) -> Survey:
        """Read all requests once and make every check that needs no image."""
        count, faulty, first = 0, 0, ""
        for request in self:
            count += 1
            faulty += bool(request.fault)
            first = first or request.fault
        return Survey(count, faulty, first, self._digest())

    def __iter__(self) -> Iterator[BatchRequest]:
        numbers: dict[str, int] = {}
        for number, (line, fields) in enumerate(self._entries(), 1):
            try:
                if isinstance(fields, str):
                    raise UserError(fields)
                request = self._request(number, line, fields)
                if (key := request.id.casefold()) in numbers:
                    raise UserError(f"id {request.id} is also that of request {numbers[key]}; ids must be unique, ignoring case")
            except UserError as error:
                fields = fields if isinstance(fields, dict) else {}
                image = fields.get("image") if isinstance(fields.get("image"), str) else ""
                where = f"{self.source.name}, line {line}: " if line else ""
                request = BatchRequest(_default_id(number, image), image, self.folder / image, line=line, fault=f"{where}{error}")
                key = request.id.casefold()
            numbers.setdefault(key, number)
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
                yield number, fields if isinstance(fields, dict) else "is not a JSON object"

    def _header(self) -> list[str]:
        with open(self.source, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            header = [name.strip() for name in next(csv.reader(file), [])]
        for name in header:
            if name not in KEYS:
                raise UserError(f"{self.source}, header: {_unknown(name)}")
            if header.count(name) > 1:
                raise UserError(f"{self.source}, header: {name} occurs twice")
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
                    yield line, f"has {len(cells)} cells, the header {len(header)}; put cells with commas in quotation marks"
                    continue
                try:
                    yield line, {name: _cell(name, cell) for name, cell in zip(header, cells, strict=False) if cell.strip()}
                except UserError as error:
                    yield line, str(error)

    def _request(self, number: int, line: int | None, fields: dict) -> BatchRequest:
        """Make a request from its fields; raises UserError, which says what is wrong."""
        for key in fields:
            if key not in KEYS:
                raise UserError(_unknown(key))
        fields = self.defaults | {key: value for key, value in fields.items() if value is not None}
        image = fields.get("image")
        if not isinstance(image, str) or not image or "\0" in image:
            raise UserError("image: is missing; give the path of an image")
        local_path(image)
        path = self.folder / image
        if not os.path.exists(path):
            raise UserError(f"image {image}: no such file or folder")
        questions = fields.get("question")
        several = isinstance(questions, list)
        questions = tuple(questions) if several else (questions,)
        if not 1 <= len(questions) <= MAX_TURNS or not all(isinstance(q, str) and q.strip() for q in questions):
            raise UserError(f"question: is missing or empty; give a text, or a list of 1 to {MAX_TURNS} as the turns of a conversation")
        return BatchRequest(
            id=_id(fields["id"]) if "id" in fields else _default_id(number, image),
            image=image,
            path=path,
            questions=questions,
            multi_turn=several,
            prompts=tuple(self._prompts(fields)),
            frame="all" if fields.get("frame") == "all" else _integer(fields.get("frame"), "frame", 0),
            slice=_text(fields.get("slice"), "slice", "AXIS:INDEX, such as axial:30"),
            series=_integer(fields.get("series"), "series", 1),
            window=_window(fields.get("window")),
            mask_threshold=_threshold(fields.get("mask_threshold")),
            max_new_tokens=_integer(fields.get("max_new_tokens"), "max_new_tokens", 1),
            line=line,
        )

    def _prompts(self, fields: dict) -> Iterator[tuple[str, Any]]:
        """Points, boxes and scribbles as one source, a mask and prompts as one each; paths are relative to the request file."""
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
    """The next row of a CSV reader, with cells of up to _MAX_CELL characters; the limit of the csv module, which is global, is restored."""
    limit = csv.field_size_limit(_MAX_CELL)
    try:
        return next(rows)
    finally:
        csv.field_size_limit(limit)


def _raise(error: OSError) -> None:
    raise error  # os.walk would silently skip a folder that cannot be read


def _kind(path: Path) -> str:
    try:
        return file_kind(path)
    except UserError:  # reported when its request is opened
        return "picture"


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key[:40], KEYS, 1)
    return f"{key[:40]!r} is unknown; {f'did you mean {near[0]}?' if near else 'use ' + ', '.join(KEYS)}"


def _id(value: Any) -> str:
    """An id as a safe file name for the output folder."""
    name = str(value) if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)) else ""
    if not _ID.fullmatch(name) or len(name.encode(errors="replace")) > _MAX_ID_BYTES:
        raise UserError(
            f"id {str(value)[:40]!r}: give letters, digits, '_', '-' and '.', not '.' or '-' first, at most {_MAX_ID_BYTES} bytes"
        )
    return name


def _default_id(number: int, image: str) -> str:
    """The running number and the file name without endings, truncated to the length of an id."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(image).name.split(".")[0])[:_MAX_STEM].strip("_")
    return f"{number:05d}-{stem}" if stem else f"{number:05d}"


def _cell(name: str, cell: str) -> Any:
    """The value of a CSV cell: JSON if it starts with [ or {, an integer for integer fields, else text."""
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


def _integer(value: Any, name: str, minimum: int) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < 10**9):
        raise UserError(f"{name}: give a whole number of {minimum} or more")
    return value


def _text(value: Any, name: str, form: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{name}: give {form}")
    return value


def _threshold(value: Any) -> float | None:
    try:
        return None if value is None else parse_threshold(value)
    except UserError as error:
        raise UserError(f"mask_threshold: {error}") from None


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
