"""An LRU cache of device arrays between questions: features of open images and KV caches of chats."""

from __future__ import annotations

import weakref
from typing import Protocol


class Evictable(Protocol):
    """An object whose device arrays can be released, and recomputed when they are needed again."""

    @property
    def nbytes(self) -> int: ...

    def release(self) -> None: ...


class DeviceCache:
    """Keeps the most recently used items within a budget and releases the least recently used ones. The items of the last call are always
    kept, even if they exceed the budget. Items are weakly referenced, so that unused ones are freed."""

    def __init__(self, budget: int):
        """budget: in bytes."""
        self.budget = budget
        self._items: dict[int, weakref.ref] = {}  # least recently used first

    def keep(self, *items: Evictable) -> None:
        """Mark `items` as just used and release older ones if the budget is exceeded."""
        for item in items:
            self._items.pop(id(item), None)
            self._items[id(item)] = weakref.ref(item)
        alive = {key: item for key, reference in self._items.items() if (item := reference()) is not None}
        self._items = {key: self._items[key] for key in alive}
        total = sum(item.nbytes for item in alive.values())
        newest = {id(item) for item in items}
        for key, item in alive.items():
            if total <= self.budget or key in newest:
                break
            total -= item.nbytes
            item.release()
            del self._items[key]
