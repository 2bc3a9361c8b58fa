"""Exit codes, the base class of usage errors, and the conversion of an OSError about a user's path into a usage error."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

EXIT_OK = 0
EXIT_INTERNAL = 1  # internal error: a traceback is printed
EXIT_USAGE = 2  # usage error: one line says what to do
EXIT_PARTIAL = 3  # done in part
EXIT_TEMPFAIL = 75  # stopped on request, or a peer was lost: the same command resumes
EXIT_INTERRUPTED = 130

# Errors caused by the machine or its permissions, whatever the file, with their remedies.
_ENVIRONMENT_ERRORS = {
    errno.EACCES: "change its permissions",
    errno.EPERM: "change its permissions",
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room",
    errno.EROFS: "choose a place that can be written to",
    errno.EFBIG: "raise the limit on the size of files",
}
# Errors caused by a wrong path, which are usage errors only if the user named the path.
_PATH_ERRORS = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "name a file",
}
_REMEDIES = _ENVIRONMENT_ERRORS | _PATH_ERRORS


class UserError(Exception):
    """A usage error: a mistake in a file, a flag or a setting. The message is one line that names it and the remedy; the command line
    prints it without a traceback and exits with code 2. If `listing` is set, the message has more lines, one per mistake."""

    listing = False


def user_message(error: UserError) -> str:
    """The text to print for an error: one line, or its listing."""
    return str(error) if error.listing else " ".join(str(error).split())


def traceback_wanted() -> bool:
    """Whether the traceback of a usage error is printed as well."""
    return os.environ.get("MIMO_TRACEBACK") == "1"


@contextlib.contextmanager
def user_path(*paths: str | os.PathLike, contents: bool = False) -> Iterator[None]:
    """Turn an OSError of the block into a UserError if the user can fix it: a full disk or missing permissions, and a path that is
    missing or of the wrong kind if it is one of `paths`, or a folder above one; with `contents`, also a file within one. Any other
    missing file is an internal error, which is not converted."""
    try:
        yield
    except OSError as error:
        named = error.errno in _PATH_ERRORS and _is_under(error.filename, paths, contents)
        if error.errno not in _ENVIRONMENT_ERRORS and not named:
            raise
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
        raise UserError(f"{where}{os.strerror(error.errno)}; {_REMEDIES[error.errno]}") from error


@contextlib.contextmanager
def config_path(field: str, path: str | os.PathLike) -> Iterator[None]:
    """Around the reading of a path that a field of the config names: `user_path` for it and the files within it, and every UserError
    names the field."""
    try:
        with user_path(path, contents=True):
            yield
    except UserError as error:
        raise type(error)(f"{field}: {error}") from error


def _is_under(filename: object, paths: tuple[str | os.PathLike, ...], contents: bool) -> bool:
    if not isinstance(filename, str | bytes | os.PathLike):
        return False
    missing = os.path.abspath(os.fsdecode(filename))
    named = [os.path.abspath(path) for path in paths]
    return any(os.path.commonpath([missing, path]) in ((missing, path) if contents else (missing,)) for path in named)
