"""A binary heap whose members can be taken out and moved: O(log n) amortised for each.

Owns nothing but the order. A member that leaves or moves leaves its old entry behind, which is skipped when it comes to
the top; invariant: there are at most twice as many entries as members, and a few, so that what was aborted is not kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Any, Generic, TypeVar

_FEW = 16

T = TypeVar("T", bound=Hashable)


class Heap(Generic[T]):
    """Least key first. No two members may have equal keys at the same time."""

    __slots__ = ("_entries", "_key_of")

    def __init__(self) -> None:
        self._entries: list[tuple[Any, T]] = []
        self._key_of: dict[T, Any] = {}

    def __len__(self) -> int:
        return len(self._key_of)

    def __iter__(self) -> Iterator[T]:
        return iter(self._key_of)

    def __contains__(self, item: T) -> bool:
        return item in self._key_of

    def put(self, item: T, key: Any) -> None:
        """Add a member, or give it another key."""
        if self._key_of.get(item) == key:
            return
        self._key_of[item] = key
        heapq.heappush(self._entries, (key, item))
        self._drop_old()

    def remove(self, item: T) -> None:
        """Take a member out, if it is one."""
        if self._key_of.pop(item, None) is not None:
            self._drop_old()

    def first(self) -> T:
        """The member of the least key; it stays."""
        entries, key_of = self._entries, self._key_of
        while key_of.get(entries[0][1]) != entries[0][0]:
            heapq.heappop(entries)
        return entries[0][1]

    def key(self, item: T) -> Any:
        return self._key_of[item]

    def _drop_old(self) -> None:
        if len(self._entries) > 2 * len(self._key_of) + _FEW:
            self._entries = [(key, item) for item, key in self._key_of.items()]
            heapq.heapify(self._entries)
