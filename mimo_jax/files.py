"""Files that are whole or not there, locks between processes, hashes, and JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import filelock

LOCK = ".lock"  # the file by which a process keeps a folder to itself


def is_partial(name: str) -> bool:
    """Whether a file has the name of one that `atomic_write` has not finished; after a kill it may be left."""
    return name.startswith(".") and name.endswith(".part")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """The path of a file beside `path` for the block to write. When the block ends well, it takes the place of `path`; otherwise it is
    removed, and `path` is as it was. An OSError names `path`, not the file beside it.

    durable: wait until the content is on the disk, so that it survives a loss of power."""
    path = Path(path)
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield part
        if durable:
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.filename in (None, str(part), part):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def locked(path: str | os.PathLike, blocking: bool = True) -> IO[str]:
    """The open file `path`, locked until it is closed, also in the processes that inherit it: of all threads and processes one at a
    time has it. A process that is killed lets go. On a file system without locks, there is none.

    Raises BlockingIOError where another has it and this is not `blocking`."""
    file = open(path, "w")
    try:
        taken = filelock.lock_descriptor(file.fileno(), blocking=blocking)
    except OSError:  # the file system knows no locks
        return file
    except BaseException:
        file.close()
        raise
    if not taken:
        file.close()
        raise BlockingIOError(errno.EAGAIN, "is in use by another process", str(path))
    return file


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def json_bytes(content: Any) -> bytes:
    """JSON as `write_json` writes it."""
    return (json.dumps(content, indent=1) + "\n").encode()


def read_json(path: Path) -> Any:
    """The file's content, None if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: Any, durable: bool = False) -> None:
    """All or nothing, as `atomic_write`."""
    with atomic_write(path, durable) as part:
        part.write_bytes(json_bytes(content))
