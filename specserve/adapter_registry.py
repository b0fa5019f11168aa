"""The adapters that the engine holds, by content hash, and who uses them.

An adapter leaves memory when it was unloaded and its last running request is done, or when it is idle and a new one
needs its place. Names live in the server; here a changed directory is simply another adapter.
"""

from __future__ import annotations

from collections import OrderedDict

from .errors import OverloadedError, UserError
from .lora import LoraAdapter


class AdapterRegistry:
    """At most `max_adapters` adapters; idle ones make room, least recently used first."""

    def __init__(self, max_adapters: int):
        self.max_adapters = max_adapters
        self.adapters: OrderedDict[str, LoraAdapter] = OrderedDict()
        self._refs: dict[str, int] = {}
        self._leaving: set[str] = set()

    @property
    def num_refs(self) -> int:
        return sum(self._refs.values())

    @property
    def size_bytes(self) -> int:
        return sum(adapter.info().size_bytes for adapter in self.adapters.values())

    def add(self, adapter: LoraAdapter) -> list[str]:
        """Register an adapter; returns the hashes evicted for it. Raises `OverloadedError` if all are in use."""
        self._leaving.discard(adapter.content_hash)
        if adapter.content_hash in self.adapters:
            return []
        evicted = []
        while len(self.adapters) >= self.max_adapters:
            idle = next((h for h in self.adapters if not self._refs.get(h)), None)
            if idle is None:
                raise OverloadedError(
                    f"all {self.max_adapters} adapter places are in use by running requests; retry later or raise "
                    "--max-adapters",
                    status=503,
                )
            del self.adapters[idle]
            evicted.append(idle)
        self.adapters[adapter.content_hash] = adapter
        return evicted

    def acquire(self, content_hash: str) -> None:
        """Count one more running request; an unknown hash tells the server to load the adapter again."""
        if content_hash not in self.adapters or content_hash in self._leaving:
            raise UserError(f"adapter {content_hash[:12]} is not loaded", code="adapter_not_resident", status=409)
        self.adapters.move_to_end(content_hash)
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
        self._leaving.discard(content_hash)
        del self.adapters[content_hash]
        return True
