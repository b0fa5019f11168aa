"""Responses that are kept for a while, to be read again and to be continued (`previous_response_id`).

In memory alone, of limited size and for a limited time; a restart forgets them. Each belongs to the name of the key
that made it, and does not exist for others. When there is no room, the oldest of the owner that holds most makes it, so
that nobody fills the store at the cost of those who keep little.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

ENTRY_BYTES = 1024  # of what an entry costs beside its texts


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """`body` is the response as JSON, `items` the conversation that it ends, its own output included, as JSON."""

    id: str
    body: bytes
    items: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.body) + len(self.items) + ENTRY_BYTES


@dataclass(slots=True)
class _Owner:
    responses: OrderedDict[str, tuple[float, StoredResponse]]  # with the time at which it ends, oldest first
    num_bytes: int = 0


class ResponseStore:
    """`max_bytes` in all, none of them older than `keep_s`; with 0 bytes it keeps nothing."""

    def __init__(self, max_bytes: int, keep_s: float, clock: Callable[[], float] = time.monotonic):
        self.max_bytes = max_bytes
        self.keep_s = keep_s
        self._clock = clock
        self._owners: dict[str, _Owner] = {}
        self.num_bytes = 0

    @property
    def is_open(self) -> bool:
        return self.max_bytes > 0

    def put(self, owner: str, response: StoredResponse) -> bool:
        """Keep it, unless it is larger than everything that may be kept; says whether."""
        if response.num_bytes > self.max_bytes:
            return False
        self.forget_old()
        while self.num_bytes + response.num_bytes > self.max_bytes:
            name = max(self._owners, key=lambda name: self._owners[name].num_bytes)
            self.delete(name, next(iter(self._owners[name].responses)))
        held = self._owners.setdefault(owner, _Owner(OrderedDict()))
        held.responses[response.id] = (self._clock() + self.keep_s, response)
        held.num_bytes += response.num_bytes
        self.num_bytes += response.num_bytes
        return True

    def get(self, owner: str, response_id: str) -> StoredResponse | None:
        self.forget_old()
        held = self._owners.get(owner)
        found = None if held is None else held.responses.get(response_id)
        return None if found is None else found[1]

    def delete(self, owner: str, response_id: str) -> bool:
        """Says whether it was there."""
        held = self._owners.get(owner)
        found = None if held is None else held.responses.pop(response_id, None)
        if held is None or found is None:
            return False
        held.num_bytes -= found[1].num_bytes
        self.num_bytes -= found[1].num_bytes
        if not held.responses:
            del self._owners[owner]
        return True

    def forget_old(self) -> float | None:
        """Drop what has been kept long enough; gives the seconds until there is more of that, None if never."""
        now = self._clock()
        for name, held in list(self._owners.items()):
            while held.responses:
                response_id, (end, _) = next(iter(held.responses.items()))
                if end > now:
                    break
                self.delete(name, response_id)
        ends = [next(iter(held.responses.values()))[0] for held in self._owners.values()]
        return min(ends) - now if ends else None
