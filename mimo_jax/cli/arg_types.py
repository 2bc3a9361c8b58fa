"""Types of command-line arguments: each parses a text, or raises argparse's error with an example."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from mimo_jax.errors import UserError, user_path

_BUCKETS = Path("/gcs")  # where every launcher, and Vertex AI, mounts buckets


class InputPath(str):
    """The path of a file or folder that a command reads; of `--data`, also NAME=PATH."""


class OutputPath(str):
    """The path of a file or folder that a command writes."""


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def index_or_all(text: str) -> int | str:
    return text if text == "all" else index(text)


def numbers(text: str, counts: tuple[int, ...], shape: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts:
        raise argparse.ArgumentTypeError(f"{text!r} is not {shape}")
    return values


def point(text: str) -> list[float]:
    return (numbers(text, (2, 3), "X,Y,LABEL such as 31,40,1") + [1.0])[:3]


def box(text: str) -> list[float]:
    return numbers(text, (4,), "X0,Y0,X1,Y1 such as 10,12,40,44")


def window(text: str) -> str | tuple[float, float]:
    """Like `data.images.image.parse_window`, but with argparse's error."""
    from mimo_jax.data.images.image import parse_window  # imports NumPy, which `--help` does not need

    try:
        return parse_window(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def threshold(text: str) -> float:
    """Like `data.mask_levels.parse_threshold`, but with argparse's error."""
    from mimo_jax.data.mask_levels import parse_threshold

    try:
        return parse_threshold(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def scribble(text: str) -> list[list[float]]:
    points = [numbers(pair, (2,), 'X,Y pairs such as "20,30 24,33"') for pair in text.split()]
    if not points:
        raise argparse.ArgumentTypeError('is empty; write X,Y pairs such as "20,30 24,33"')
    return points


def endings(text: str) -> list[str]:
    """Parses ".png,nii.gz" as [".png", ".nii.gz"]."""
    return list(dict.fromkeys(f".{part.strip().lstrip('.').lower()}" for part in text.split(",") if part.strip(" .")))


def shard(text: str) -> tuple[int, int]:
    which, _, count = text.partition("/")
    if not which.isdecimal() or not count.isdecimal() or int(which) >= int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, such as 0/4")
    return int(which), int(count)


def fraction(text: str) -> float:
    value = numbers(text, (1,), "a fraction such as 0.01")[0]
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 0 to 1")
    return value


def ratios(text: str) -> tuple[float, ...]:
    values = numbers(text, (3,), "TRAIN,VAL,TEST such as 0.9,0.05,0.05")
    if min(values) < 0 or not 0 < sum(values) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers of 0 or more, one of them above 0")
    return tuple(values)


def names(text: str) -> list[str]:
    """Parses "aligner,queries" as ["aligner", "queries"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def seeds(text: str) -> list[int]:
    return list(dict.fromkeys(index(part) for part in names(text)))


def resolve_bucket(word: str) -> str:
    """Replace gs://BUCKET/x in a word of the command line, also after an equals sign, by /gcs/BUCKET/x. Raises UserError if the bucket is
    not mounted there, and for other object stores, whose URLs would otherwise be used as local paths."""
    place = re.search(r"(?:^|=)((gs|s3|r2|az|abfs)://([^/]+))", word)
    if not place:
        return word
    url, store, bucket = place.groups()
    if store != "gs":
        raise UserError(f"{word}: {store} is not read directly; mount {bucket} and name the folder")
    if not (_BUCKETS / bucket).is_dir():
        raise UserError(f"{word}: {url} is not mounted; run gcsfuse --implicit-dirs {bucket} {_BUCKETS / bucket}, then this again")
    return word.replace(url, str(_BUCKETS / bucket), 1)


@contextlib.contextmanager
def named_paths(args: argparse.Namespace) -> Iterator[None]:
    """`user_path` for every InputPath and OutputPath of the command line; a file missing within an OutputPath is an internal error."""
    read: list[str] = []
    written: list[str] = []
    for value in vars(args).values():
        for path in value if isinstance(value, list) else [value]:
            if path and isinstance(path, InputPath):
                read += [path, path.partition("=")[2] or path]
            elif path and isinstance(path, OutputPath):
                written.append(path)
    with user_path(*written), user_path(*read, contents=True):
        yield
