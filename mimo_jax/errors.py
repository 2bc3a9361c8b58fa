"""The root of every error that is the user's to mend, and the line that tells it."""

import errno
import os

# What the operating system refuses because of a path, a permission or a full disk.
_USER_ERRNO = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTDIR, errno.EISDIR}


class UserError(ValueError):
    """A mistake in a file, a flag or a setting. The message is one line that names it and says what to do;
    the command line prints that line, without a traceback, and exits with code 2. With `listing`, lines follow it that
    list what is wrong, one thing each."""

    listing = False


def line(error: BaseException) -> str | None:
    """What to print of an error that is the user's to mend; None of one that is ours."""
    if isinstance(error, UserError):
        return str(error) if error.listing else " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _USER_ERRNO:
        return f"{error.filename}: {error.strerror}" if error.filename else os.strerror(error.errno)
    return None
