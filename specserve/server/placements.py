"""Which contents the engine holds, by the numbers of its answers to loads.

An adapter that leaves does so with the number of the newest load that was told that it is there. Answers come from
threads of the engine's, so that one may come behind news of a later departure, and the other way round: what is known
is the same in whatever order they come. Plain bookkeeping.
"""

from __future__ import annotations

MAX_LEFT = 65_536  # contents that left, remembered for answers that are still to come


class Placements:
    """Of one engine process."""

    def __init__(self) -> None:
        self._newest: dict[str, int] = {}  # content hash -> placement, of what is held
        self._left: dict[str, int] = {}  # content hash -> the newest placement that has ended; left last last

    def arrived(self, content_hash: str, placement: int) -> None:
        """A load was answered."""
        if placement > max(self._left.get(content_hash, 0), self.newest(content_hash)):
            self._newest[content_hash] = placement

    def left(self, content_hash: str, placement: int) -> bool:
        """It left; whether it is held no more, as no load that was answered has placed it since."""
        self._left[content_hash] = max(placement, self._left.pop(content_hash, 0))
        if len(self._left) > MAX_LEFT:
            del self._left[next(iter(self._left))]
        if placement < self.newest(content_hash):
            return False
        self._newest.pop(content_hash, None)
        return True

    def newest(self, content_hash: str) -> int:
        """The placement by which it is held; 0: it is not."""
        return self._newest.get(content_hash, 0)
