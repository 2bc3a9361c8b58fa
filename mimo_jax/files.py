"""Files and folders that are complete or not there, locks between processes, what a disk refuses, hashes, and JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import filelock

from mimo_jax.errors import UserError

LOCK = ".lock"  # the file by which a process keeps a folder to itself
# What a disk refuses, in the words that stand in errors of libraries written in C++, which raise no OSError.
_REFUSALS = [
    os.strerror(getattr(errno, name))
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM", "ENOENT", "ENOTDIR", "EISDIR", "ESTALE")
]


def absolute(path: str | os.PathLike) -> Path:
    """From the root, without "..", links as they are."""
    return Path(os.path.abspath(path))


# --- complete or not there


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


@contextlib.contextmanager
def atomic_folder(out: str | os.PathLike, replace: bool = False) -> Iterator[Path]:
    """A new folder, in a hidden one beside `out`, for the block to fill. When the block ends well, it becomes `out`; otherwise it is
    removed, and `out` is as it was. A killed process leaves the hidden folder, which the next one that writes `out` removes.

    replace: `out` is there and its content makes way. UserError where it holds anything without that, and where another process
    writes it."""
    out = absolute(out)
    work = _work_folder(out)
    new, old = work / out.name, _replaced(out)
    with claimed(work, out):
        try:
            restore(out)
            if not replace:
                check_new(out)
            with disk_errors(out):
                for left in (new, old):  # of a killed process
                    if left.exists():
                        shutil.rmtree(left)
                new.mkdir()
            yield new
            with disk_errors(out):
                if replace:
                    os.rename(out, old)
                os.rename(new, out)  # takes the place of an empty folder
        finally:
            restore(out)
            for left in (new, old):
                shutil.rmtree(left, ignore_errors=True)
            with contextlib.suppress(OSError):
                (work / LOCK).unlink()  # last, so that nobody else comes in before
                work.rmdir()


def restore(out: Path) -> None:
    """Put back the folder `out` that a process moved away to replace it, and was killed before it did."""
    if _replaced(out).exists() and not out.exists():
        os.rename(_replaced(out), out)


def _work_folder(out: Path) -> Path:
    return out.absolute().with_name(f".{out.name}.partial")


def _replaced(out: Path) -> Path:
    return _work_folder(out) / f"{out.name}.old"


def check_new(out: Path) -> None:
    """UserError if `out` is there, and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; give another --out or remove it")


@contextlib.contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Remove `folder` where the block fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# --- locks


def claimed(folder: Path, out: Path) -> IO[str]:
    """Make `folder`, in which `out` is written, and keep it to this process until the lock that is returned is closed. UserError
    where another process has it."""
    while True:
        with disk_errors(out):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = locked(folder / LOCK, blocking=False)
            except BlockingIOError:
                raise UserError(f"{out}: is being written by another process; wait for it, or give another --out") from None
            except FileNotFoundError:  # whoever had the folder removed it in between
                continue
        if os.fstat(lock.fileno()).st_nlink:
            return lock
        lock.close()  # of a file that was removed in between


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


# --- what the disk refuses


@contextlib.contextmanager
def disk_errors(
    path: str | os.PathLike, error_type: type[UserError] = UserError, remedy: str = "mend that and run the same command again"
) -> Iterator[None]:
    """Around the writing of `path`: turn what the disk refuses into "PATH: cannot be written: REASON; REMEDY". Other errors pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = disk_fault(error)
        if reason is None:
            raise
        raise error_type(f"{path}: cannot be written: {reason}; {remedy}") from error


def disk_fault(error: BaseException | None) -> str | None:
    """What the operating system refused, if that is what went wrong; tensorstore and ArrayRecord report it within a text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return os.strerror(error.errno)
        if reason := next((text for text in _REFUSALS if text in str(error)), None):
            return reason
        error = error.__cause__ or error.__context__
    return None


# --- hashes and JSON


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
