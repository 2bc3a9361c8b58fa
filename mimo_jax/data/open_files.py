"""A bounded number of open files, and what to do if the system opens no more."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

MAX_OPEN = 64  # files that one OpenFiles keeps open

T = TypeVar("T")


class OpenFiles(Generic[T]):
    """The files that were read last, each as what `open_file` returns. A file that is dropped is closed once no thread reads it any more.
    It can be used from several threads, and is pickled without its files."""

    def __init__(self, open_file: Callable[[Path], T]):
        self.open_file = open_file
        self.__setstate__({})

    def __getitem__(self, path: Path) -> T:
        """Raises what `open_file` raises."""
        with self._lock:
            found = self._files.pop(path, None)
            if found is None:
                if len(self._files) >= MAX_OPEN:
                    self._files.popitem(last=False)
                found = self.open_file(path)
            self._files[path] = found
        return found

    def __getstate__(self) -> dict:
        return {"open_file": self.open_file}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._files: OrderedDict[Path, T] = OrderedDict()  # the file used last at the end
        self._lock = threading.Lock()


def remedy_for(error: Exception, remedy: str) -> str:
    """`remedy` for a file that cannot be read, or that of the limit on open files if this is why."""
    if os.strerror(errno.EMFILE) not in str(error):  # libraries raise errors of their own with its text
        return remedy
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"this process may open {limit} files; raise the limit with ulimit -n"
