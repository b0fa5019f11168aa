"""Virtual token counters: who goes next of several that share a server (Sheng et al., "Fairness in Serving Large
Language Models", OSDI 2024).

A member's counter grows by what it was served, and of those that wait the one with the least goes next. One that comes
back with nothing waiting begins where the others are, so that nobody saves service up. Counters are compared by quanta:
within one, the member whose next sequence is due first goes first. Owns the order of members and not what waits of
them. Invariant: the owner knows a member while something of it waits or runs, or while it is ahead of the present
quantum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from .heap import Heap

QUANTUM = 256.0  # of cost


class Member:
    """Who has a counter. `served` is its cost since the counters began, `num_running` what was admitted of it and has
    not ended, and `number` makes keys differ."""

    __slots__ = ("num_running", "number", "served")

    def __init__(self, number: int):
        self.number = number
        self.served = 0.0
        self.num_running = 0


M = TypeVar("M", bound=Member)


class Counters(Generic[M]):
    """The order of members; each operation is O(log n) of them."""

    def __init__(self) -> None:
        self._num_ever = 0
        self._backlogged: Heap[M] = Heap()
        self._idle: Heap[M] = Heap()  # nothing waits or runs, and yet ahead of the present quantum
        self._quantum = 0  # the present one: the least of those that wait, or was

    @property
    def num_backlogged(self) -> int:
        return len(self._backlogged)

    def new_number(self) -> int:
        self._num_ever += 1
        return self._num_ever

    def first(self) -> M:
        """Who goes next; stays."""
        return self._backlogged.first()

    def lead(self, member: M) -> float:
        """The cost by which it is ahead of the present quantum's begin."""
        return max(0.0, member.served - self._quantum * QUANTUM)

    def begin(self, member: M) -> None:
        """Something of it begins to wait, where nothing did."""
        member.served = max(member.served, self._quantum * QUANTUM)
        self._idle.remove(member)

    def advance(self) -> None:
        """Somebody is about to be admitted, of whom it is: the turn is that of the first."""
        quantum, *_ = self._backlogged.key(self._backlogged.first())
        self._quantum = max(self._quantum, quantum)

    def place(self, member: M, head: tuple[float, int] | None) -> bool:
        """Where it belongs after any change: `head` is when its next sequence is due, and its number, if one waits.

        Whether there is nothing more to know of it.
        """
        if head is not None:
            self._backlogged.put(member, (int(member.served // QUANTUM), *head))
            return False
        self._backlogged.remove(member)
        if member.num_running:
            return False
        if self.lead(member) > 0.0:
            self._idle.put(member, (member.served, member.number))
            return False
        self._idle.remove(member)
        return True

    def caught_up(self) -> Iterator[M]:
        """Idle ones that are no longer ahead: there is nothing more to know of them."""
        while self._idle and self.lead(first := self._idle.first()) <= 0.0:
            self._idle.remove(first)
            yield first
