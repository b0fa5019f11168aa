"""The one table of which contents which replicas hold, and by the number of which load.

The server's numbers of placements grow over all replicas: it hears that a content has left when the last copy has.
Copies that were made beside the server's own loads have no number of its, and go with what they are copies of. Plain
bookkeeping; whatever order news of a replica come in, what is known is the same.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from ..adapter_messages import AdapterInfo


@dataclass(slots=True)
class Held:
    """One content: from where it is read, and who has it by the replica's own number."""

    name: str
    path: str
    mount: int
    info: AdapterInfo
    placement: int  # the newest that the server was told
    by_replica: dict[str, int] = field(default_factory=dict)
    is_pinned: bool = False


class Holders:
    """By content hash."""

    def __init__(self) -> None:
        self._held: dict[str, Held] = {}
        self._by_replica: dict[str, set[str]] = {}
        self._newest = 0

    def get(self, content_hash: str) -> Held | None:
        return self._held.get(content_hash)

    def of(self, content_hash: str | None) -> Collection[str]:
        """Who has it."""
        held = self._held.get(content_hash or "")
        return held.by_replica.keys() if held is not None else ()

    def num_of(self, replica: str) -> int:
        return len(self._by_replica.get(replica, ()))

    def loaded(self, name: str, path: str, mount: int, info: AdapterInfo, replica: str, number: int) -> int:
        """The server's load has ended there, by the replica's `number`; the placement that the server is told."""
        self._newest += 1
        before = self._held.get(info.content_hash)
        held = Held(name, path, mount, info, self._newest)
        if before is not None:
            held.by_replica, held.is_pinned = before.by_replica, before.is_pinned
        self._held[info.content_hash] = held
        self._note(held, replica, number)
        return self._newest

    def copied(self, content_hash: str, replica: str, number: int) -> bool:
        """A copy is there; False where it is no longer wanted."""
        held = self._held.get(content_hash)
        if held is None:
            return False
        self._note(held, replica, number)
        return True

    def _note(self, held: Held, replica: str, number: int) -> None:
        held.by_replica[replica] = max(number, held.by_replica.get(replica, 0))
        self._by_replica.setdefault(replica, set()).add(held.info.content_hash)

    def left(self, content_hash: str, replica: str, number: int) -> int | None:
        """A replica holds this by `number` no more. The server's placement if nobody has it now, else None."""
        held = self._held.get(content_hash)
        if held is None or held.by_replica.get(replica, number + 1) > number:
            return None
        del held.by_replica[replica]
        self._by_replica[replica].discard(content_hash)
        if held.by_replica:
            return None
        del self._held[content_hash]
        return held.placement

    def replica_lost(self, replica: str) -> dict[str, int]:
        """It holds nothing any more; by content what the server is told, of those that nobody has now."""
        gone = {}
        for content_hash in self._by_replica.pop(replica, set()):
            held = self._held[content_hash]
            del held.by_replica[replica]
            if not held.by_replica:
                del self._held[content_hash]
                gone[content_hash] = held.placement
        return gone

    def forget(self, content_hash: str) -> dict[str, int]:
        """Nobody shall have it; who had it, by the replica's number."""
        held = self._held.pop(content_hash, None)
        if held is None:
            return {}
        for replica in held.by_replica:
            self._by_replica[replica].discard(content_hash)
        return held.by_replica

    def pinned(self) -> list[Held]:
        return [held for held in self._held.values() if held.is_pinned]
