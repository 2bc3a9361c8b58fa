"""Atomic writing of files and folders, locks between processes, errors of the file system, hashes, and JSON."""

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

LOCK = ".lock"  # name of the file by which a process locks a folder
# Messages of file system errors, which C++ libraries include in their own errors instead of raising OSError.
_ERROR_MESSAGES = [
    os.strerror(getattr(errno, name))
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM", "ENOENT", "ENOTDIR", "EISDIR", "ESTALE")
]


def absolute(path: str | os.PathLike) -> Path:
    """The absolute path without "..", with links unresolved."""
    return Path(os.path.abspath(path))


# --- atomic writing


def is_partial(name: str) -> bool:
    """Whether a file has the name of a temporary file of `atomic_write`, which a killed process may leave behind."""
    return name.startswith(".") and name.endswith(".part")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """Yield the path of a temporary file next to `path` for the block to write. If the block succeeds, the file replaces `path`; otherwise
    it is removed, and `path` is unchanged. An OSError names `path`, not the temporary file.

    durable: wait until the content is on the disk, so that it survives a power failure."""
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
    """Yield a new folder, in a hidden folder next to `out`, for the block to fill. If the block succeeds, it becomes `out`; otherwise it is
    removed, and `out` is unchanged. A killed process leaves the hidden folder, which the next process that writes `out` removes.

    replace: `out` exists and is replaced. Raises UserError if `out` is not empty and not to be replaced, and if another process is
    writing it."""
    out = absolute(out)
    work = _work_folder(out)
    new, old = work / out.name, _replaced(out)
    with claimed(work, out):
        try:
            restore(out)
            if not replace:
                check_new(out)
            with disk_errors(out):
                for folder in (new, old):  # left by a killed process
                    if folder.exists():
                        shutil.rmtree(folder)
                new.mkdir()
            yield new
            with disk_errors(out):
                if replace:
                    os.rename(out, old)
                os.rename(new, out)  # replaces an empty folder
        finally:
            restore(out)
            for folder in (new, old):
                shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                (work / LOCK).unlink()  # last, so that no other process enters before
                work.rmdir()


def restore(out: Path) -> None:
    """Move the folder `out` back if a process was killed after it had moved it away and before it replaced it."""
    if _replaced(out).exists() and not out.exists():
        os.rename(_replaced(out), out)


def _work_folder(out: Path) -> Path:
    return out.absolute().with_name(f".{out.name}.partial")


def _replaced(out: Path) -> Path:
    return _work_folder(out) / f"{out.name}.old"


def check_new(out: Path) -> None:
    """Raises UserError if `out` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not an empty folder; give another --out or remove it")


@contextlib.contextmanager
def removed_on_failure(folder: Path) -> Iterator[None]:
    """Remove `folder` if the block fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


# --- locks


def claimed(folder: Path, out: Path) -> IO[str]:
    """Create `folder`, in which `out` is written, and lock it for this process until the returned file is closed. Raises UserError if
    another process holds the lock."""
    while True:
        with disk_errors(out):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = locked(folder / LOCK, blocking=False)
            except BlockingIOError:
                raise UserError(f"{out}: is being written by another process; wait for it, or give another --out") from None
            except FileNotFoundError:  # another process has just removed the folder
                continue
        if os.fstat(lock.fileno()).st_nlink:
            return lock
        lock.close()  # another process has just removed the file


def locked(path: str | os.PathLike, blocking: bool = True) -> IO[str]:
    """Open the file `path` and lock it exclusively, among all threads and processes, until it is closed here and in all processes that
    inherit it. The lock of a killed process is released. On a file system without locks, nothing is locked.

    Raises BlockingIOError if it is locked by another and not `blocking`."""
    file = open(path, "w")
    try:
        acquired = filelock.lock_descriptor(file.fileno(), blocking=blocking)
    except OSError:  # the file system does not support locks
        return file
    except BaseException:
        file.close()
        raise
    if not acquired:
        file.close()
        raise BlockingIOError(errno.EAGAIN, "is in use by another process", str(path))
    return file


# --- errors of the file system


@contextlib.contextmanager
def disk_errors(
    path: str | os.PathLike, error_type: type[UserError] = UserError, remedy: str = "fix that and run the same command again"
) -> Iterator[None]:
    """Turn file system errors while the block writes `path` into an `error_type` "PATH: cannot be written: REASON; REMEDY"."""
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
    """The file system error that caused `error`, None if it has another cause; tensorstore and ArrayRecord report it within a text."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return os.strerror(error.errno)
        if reason := next((text for text in _ERROR_MESSAGES if text in str(error)), None):
            return reason
        error = error.__cause__ or error.__context__
    return None


# --- hashes and JSON


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_bytes(content: bytes) -> str:
    """The SHA-256 of `content`, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def json_bytes(content: Any) -> bytes:
    """The bytes that `write_json` writes."""
    return (json.dumps(content, indent=1) + "\n").encode()


def read_json(path: Path) -> Any:
    """The parsed content of a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: Any, durable: bool = False) -> None:
    """Write a JSON file atomically; durable: see `atomic_write`."""
    with atomic_write(path, durable) as part:
        part.write_bytes(json_bytes(content))
