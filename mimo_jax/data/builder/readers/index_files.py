"""Reads JSON indices of sources value by value: an index of millions of lines is never in memory as a whole."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from mimo_jax.data.records import DataError

_CHUNK = 1 << 20  # characters read at a time
_MAX_VALUE = 1 << 26  # characters of one value, so that a damaged file is not read to its end in search of the end of a value


def pairs(path: Path) -> Iterator[tuple[str, Any]]:
    """The (key, value) pairs of a file that contains one JSON object, in order. Raises DataError if it is damaged or something else."""
    with _reading(path) as file:
        text = _Text(path, file)
        text.take("{", "a JSON object")
        while text.next() != "}":
            key = text.value()
            if not isinstance(key, str):
                raise text.damaged()
            text.take(":")
            yield key, text.value()
            if text.next() != "}":
                text.take(",")
        text.take("}")
        text.end()


def entries(path: Path) -> Iterator[dict]:
    """The objects of a file that contains a JSON list, or one object per line (.jsonl); errors as for `pairs`."""
    if path.suffix == ".jsonl":
        for number, value in lines(path):
            yield _object(f"{path}, line {number}", value)
        return
    with _reading(path) as file:
        text = _Text(path, file)
        text.take("[", "a JSON list")
        number = 0
        while text.next() != "]":
            number += 1
            yield _object(f"{path}, entry {number}", text.value())
            if text.next() != "]":
                text.take(",")
        text.take("]")
        text.end()


def lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each nonblank line."""
    with _reading(path) as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                try:
                    yield number, json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}, line {number}: is not JSON ({error})") from None


def read(path: Path) -> Any:
    """The value of a small JSON file."""
    with _reading(path) as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is not JSON ({error})") from None


def pickled(path: Path) -> Any:
    """The content of a pickle of lists, dicts, texts and numbers; a pickle that refers to any code is refused before it runs."""
    try:
        return _Plain(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged pickle may raise any error
        raise DataError(f"{path}: is damaged or not a pickle of plain lists and texts ({error})") from None


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _object(where: str, value: Any) -> dict:
    if not isinstance(value, dict):
        raise DataError(f"{where}: is not a JSON object")
    return value


@contextmanager
def _reading(path: Path) -> Iterator[TextIO]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


class _Text:
    """A JSON text, read in chunks."""

    def __init__(self, path: Path, file: TextIO):
        self.path, self.file = path, file
        self.ahead, self.at, self.before = "", 0, 0  # before: number of characters already dropped
        self.decoder = json.JSONDecoder()

    def more(self) -> bool:
        chunk = self.file.read(max(_CHUNK, len(self.ahead) - self.at))
        self.before += self.at
        self.ahead, self.at = self.ahead[self.at :] + chunk, 0
        return bool(chunk)

    def next(self) -> str:
        """The next nonblank character, without consuming it; "" at the end."""
        while True:
            while self.at < len(self.ahead):
                if not self.ahead[self.at].isspace():
                    return self.ahead[self.at]
                self.at += 1
            if not self.more():
                return ""

    def take(self, character: str, what: str = "") -> None:
        if self.next() != character:
            raise DataError(f"{self.path}: is not {what}") if what else self.damaged()
        self.at += 1

    def value(self) -> Any:
        self.next()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.ahead, self.at)
            except (ValueError, RecursionError):
                if len(self.ahead) - self.at < _MAX_VALUE and self.more():
                    continue
                raise self.damaged() from None
            number = self.ahead[self.at] in "-0123456789"
            if number and (end == len(self.ahead) or self.ahead[end] not in ",]} \t\r\n") and self.more():
                continue  # the number may continue in the next chunk
            self.at = end
            return value

    def end(self) -> None:
        if self.next():
            raise self.damaged()

    def damaged(self) -> DataError:
        return DataError(f"{self.path}: is damaged or cut off near character {self.before + self.at}; copy or download it again")
