"""Values of command-line flags: text to what it means, or argparse's error with an example."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from mimo_jax.errors import UserError, user_path

_BUCKETS = Path("/gcs")  # where every launcher mounts them, and Vertex AI does
_OUTPUTS = {"out", "workdir", "overlays", "plots", "llm_cache"}  # flags of what is written: a file gone from there is not the user's fault
_TEXTS = {"question", "command"}


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
    """`data.images.image.parse_window`, with argparse's error."""
    from mimo_jax.data.images.image import parse_window  # loads NumPy, which other flags do without

    try:
        return parse_window(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def scribble(text: str) -> list[list[float]]:
    points = [numbers(pair, (2,), 'X,Y pairs such as "20,30 24,33"') for pair in text.split()]
    if not points:
        raise argparse.ArgumentTypeError('is empty; write X,Y pairs such as "20,30 24,33"')
    return points


def endings(text: str) -> list[str]:
    """ ".png,nii.gz" as [".png", ".nii.gz"]."""
    return list(dict.fromkeys(f".{part.strip().lstrip('.').lower()}" for part in text.split(",") if part.strip(" .")))


def part(text: str) -> tuple[int, int]:
    which, _, count = text.partition("/")
    if not which.isdecimal() or not count.isdecimal() or int(which) >= int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, such as 0/4")
    return int(which), int(count)


def share(text: str) -> float:
    value = numbers(text, (1,), "a share such as 0.01")[0]
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 0 to 1")
    return value


def ratios(text: str) -> tuple[float, ...]:
    values = numbers(text, (3,), "TRAIN,VAL,TEST such as 0.9,0.05,0.05")
    if min(values) < 0 or not 0 < sum(values) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not three numbers of 0 or more, one of them above 0")
    return tuple(values)


def names(text: str) -> list[str]:
    """ "aligner,queries" as ["aligner", "queries"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def seeds(text: str) -> list[int]:
    return list(dict.fromkeys(index(part) for part in names(text)))


def mounted(word: str) -> str:
    """A word of the command line with gs://BUCKET/x, also behind an equals sign, as the file /gcs/BUCKET/x. UserError where the bucket is
    not mounted there, and for other object stores: their names would be taken for folders of this machine."""
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
    """`user_path` for every path that the command line names, NAME=PATH included."""
    named: dict[bool, list[str]] = {True: [], False: []}
    for flag, value in vars(args).items():
        for word in value if isinstance(value, list | tuple) else [value]:
            if isinstance(word, str | Path) and str(word) and flag not in _TEXTS:
                named[flag not in _OUTPUTS] += [str(word), str(word).partition("=")[2] or str(word)]
    with user_path(*named[False]), user_path(*named[True], contents=True):
        yield
