"""Process-wide settings. The `mimo` command applies them to its own process, and the worker processes of the dataset builder to
themselves; importing the package, or calling its functions from another program, never does."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _THRESHOLD = -1, -3, 256 << 20  # of glibc's mallopt; bytes


def set_up(command: str) -> None:
    """Set up this process for `mimo COMMAND`."""
    if command == "train":
        _restart_with_huge_pages()
    if command == "data":
        keep_freed_memory()
    warnings.formatwarning = lambda message, category, *_, **__: f"mimo: warning: {message}\n"
    # Compiled programs are cached on disk, so that a second `ask` starts in seconds.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache_home() / "jax"))
    quiet_orbax()


def cache_home() -> Path:
    """The folder of compiled programs and named models: MIMO_HOME, else mimo_jax in the user's cache folder."""
    if home := os.environ.get("MIMO_HOME"):
        return Path(home).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mimo_jax"


def keep_freed_memory() -> None:
    """Let glibc keep freed memory: mapping and clearing the pages of every image again takes a fifth of the dataset builder's time."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, _THRESHOLD)


def _restart_with_huge_pages() -> None:
    """Restart this process with huge pages for large arrays, a setting that the C library reads only at startup. On a CPU this shortens a
    step by a tenth or more (benchmarks/RESULTS.md). A C library that does not know the setting ignores it."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def quiet_orbax() -> None:
    """Suppress log messages of orbax that would hide the one line of a usage error. Errors in its threads are also raised; if one of
    several arrays cannot be written, the others report to an event loop that is already closed, which is suppressed too."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_worth_logging)
    sys.unraisablehook = _unraisable_hook


def _is_worth_logging(record: logging.LogRecord) -> bool:
    if record.name == "asyncio":
        return "Handler._open_and_write" not in record.getMessage()
    if "Skipping merge of OCDBT" in str(record.msg):  # the path may be that of absl, through which orbax logs
        return False
    return f"{os.sep}orbax{os.sep}" not in record.pathname or record.levelno < logging.ERROR


def _unraisable_hook(unraisable: Any) -> None:
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(unraisable)
