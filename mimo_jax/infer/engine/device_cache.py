"""What is kept on the device between questions, within a bound: features of open images, KV caches of chats."""

from __future__ import annotations

import weakref
from typing import Protocol


class Evictable(Protocol):
    """Something whose arrays can be let go, and made again when they are needed."""

    @property
    def nbytes(self) -> int: ...

    def release(self) -> None: ...


class DeviceCache:
    """Keeps what was used last. Over the budget, what was used longest ago is released, but never what was used last: one that is
    larger than the budget still is kept. What nobody else holds any more is forgotten."""

    def __init__(self, budget: int):
        """budget: bytes."""
        self.budget = budget
        self._kept: dict[int, weakref.ref] = {}  # least recently used first

    def keep(self, *items: Evictable) -> None:
        """`items` were used just now, together: all of them stay."""
        for item in items:
            self._kept.pop(id(item), None)
            self._kept[id(item)] = weakref.ref(item)
        alive = {key: item for key, held in self._kept.items() if (item := held()) is not None}
        self._kept = {key: self._kept[key] for key in alive}
        total = sum(item.nbytes for item in alive.values())
        newest = {id(item) for item in items}
        for key, item in alive.items():
            if total <= self.budget or key in newest:
                break
            total -= item.nbytes
            item.release()
            del self._kept[key]
