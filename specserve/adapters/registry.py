"""The adapters that the engine holds, by content hash, and who uses them.

An adapter leaves memory when it was unloaded, or has to make room, and its last running request is done. Names live in
the server; here a changed directory is simply another adapter.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from ..errors import OverloadedError, UserError
from .lora import LoraAdapter

ARRIVAL_S = 2.0  # how long an adapter that nobody used yet is kept for the request that it was loaded for
STAY_S = 1.0  # an adapter in use makes room for others after so long at the earliest
PATIENCE_S = 5.0  # when the one that was asked to make room has not, another is asked


class AdapterRegistry:
    """At most `max_adapters` adapters; idle ones make room, least recently used first."""

    def __init__(self, max_adapters: int, clock: Callable[[], float] = time.monotonic):
        self.max_adapters = max_adapters
        self.adapters: OrderedDict[str, LoraAdapter] = OrderedDict()
        self._clock = clock
        self._refs: dict[str, int] = {}
        self._leaving: set[str] = set()
        self._since: dict[str, float] = {}
        self._unused: set[str] = set()
        self._asked = 0.0  # when an adapter was last asked to make room

    @property
    def num_refs(self) -> int:
        return sum(self._refs.values())

    @property
    def size_bytes(self) -> int:
        return sum(adapter.info().size_bytes for adapter in self.adapters.values())

    def add(self, adapter: LoraAdapter) -> list[str]:
        """Register an adapter; returns the hashes evicted for it. Raises `OverloadedError` if all are in use."""
        evicted = self._make_room(adapter, arrival_s=0.0)
        if evicted is None:
            raise OverloadedError(
                f"all {self.max_adapters} adapter places are in use by running requests; retry later or raise "
                "--max-adapters",
                status=503,
            )
        self._put(adapter)
        return evicted

    def is_staying(self, content_hash: str) -> bool:
        """Whether requests for it would be taken now."""
        return content_hash in self.adapters and content_hash not in self._leaving

    def place(self, adapter: LoraAdapter) -> list[str] | None:
        """As `add`, for an adapter that can wait: None while there is no room, and one in use is then to make it.

        That one takes no new request; its server loads it again, in turn, behind those that wait already.
        """
        evicted = self._make_room(adapter, arrival_s=ARRIVAL_S)
        if evicted is not None:
            self._put(adapter)
        elif not self._leaving or self._clock() - self._asked >= PATIENCE_S:
            now = self._clock()
            staying = [key for key in self._refs if key not in self._leaving and now - self._since[key] >= STAY_S]
            if staying:
                self._leaving.add(min(staying, key=self._since.__getitem__))
                self._asked = now
        return evicted

    def _make_room(self, adapter: LoraAdapter, arrival_s: float) -> list[str] | None:
        """Evict until `adapter` fits; None when nobody idle can go."""
        if adapter.content_hash in self.adapters:
            return []
        now = self._clock()
        evicted: list[str] = []
        while len(self.adapters) >= self.max_adapters:
            idle = (key for key in self.adapters if not self._refs.get(key))
            oldest = next((key for key in idle if key not in self._unused or now - self._since[key] >= arrival_s), None)
            if oldest is None:
                return None
            self._drop(oldest)
            evicted.append(oldest)
        return evicted

    def _put(self, adapter: LoraAdapter) -> None:
        self._leaving.discard(adapter.content_hash)
        if adapter.content_hash not in self.adapters:
            self.adapters[adapter.content_hash] = adapter
            self._since[adapter.content_hash] = self._clock()
            self._unused.add(adapter.content_hash)

    def acquire(self, content_hash: str) -> None:
        """Count one more running request; an unknown hash tells the server to load the adapter again."""
        if content_hash not in self.adapters or content_hash in self._leaving:
            raise UserError(f"adapter {content_hash[:12]} is not loaded", code="adapter_not_resident", status=409)
        self.adapters.move_to_end(content_hash)
        self._unused.discard(content_hash)
        self._refs[content_hash] = self._refs.get(content_hash, 0) + 1

    def release(self, content_hash: str) -> bool:
        """Count one less; True when that freed an adapter that was waiting to leave."""
        self._refs[content_hash] -= 1
        if self._refs[content_hash]:
            return False
        del self._refs[content_hash]
        return self._drop_if_leaving(content_hash)

    def unload(self, content_hash: str) -> bool:
        """Let the adapter go once nobody uses it; True when it is gone already."""
        if content_hash not in self.adapters:
            return False
        self._leaving.add(content_hash)
        return not self._refs.get(content_hash) and self._drop_if_leaving(content_hash)

    def _drop_if_leaving(self, content_hash: str) -> bool:
        if content_hash not in self._leaving:
            return False
        self._drop(content_hash)
        return True

    def _drop(self, content_hash: str) -> None:
        del self.adapters[content_hash], self._since[content_hash]
        self._leaving.discard(content_hash)
        self._unused.discard(content_hash)
