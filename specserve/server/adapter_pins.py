"""Adapter names that are pinned: whatever they mean stays where steps can use it.

The engine pins contents, users pin names; here is which contents the engine was told to keep, so that one is let go
when no pinned name means it any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager

from .engine_client.serving_engine import ServingEngine


class AdapterPins:
    """The pins of one engine, over its processes."""

    def __init__(self, engine: ServingEngine):
        self.names: set[str] = set()
        self._attempts: dict[str, set[object]] = {}  # that have not ended, of names that none has pinned for good
        self._engine = engine
        self._hashes: set[str] = set()  # that the engine was told to keep

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """`name` is pinned, from now on where this or another attempt meanwhile succeeds; one that fails unpins nothing
        that was pinned before."""
        if name not in self.names:
            self.names.add(name)
            self._attempts[name] = set()
        attempts, this = self._attempts.get(name), object()
        if attempts is None:  # one has succeeded
            yield
            return
        attempts.add(this)
        try:
            yield
        except BaseException:
            attempts.discard(this)
            if not attempts and self._attempts.get(name) is attempts:
                self.unpin(name)
            raise
        if self._attempts.get(name) is attempts:  # it was not unpinned meanwhile
            del self._attempts[name]

    def unpin(self, name: str) -> None:
        """Also for attempts that have not ended."""
        self.names.discard(name)
        self._attempts.pop(name, None)

    def told(self, content_hash: str) -> None:
        """A load said that its name was pinned."""
        self._hashes.add(content_hash)

    async def keep(self, content_hash: str, placement: int) -> None:
        """Raises `UserError` where the engine does not hold it; `placement` is the newest that is known."""
        self._hashes.add(content_hash)
        await self._engine.pin_adapter(content_hash, True, placement)

    async def follow(self, content_hash: str, names: Set[str], placement: int) -> None:
        """Let the engine keep it no longer if none of `names`, which mean it, is pinned; `placement` as in `keep`."""
        if content_hash in self._hashes and not names & self.names:
            self._hashes.discard(content_hash)
            await self._engine.pin_adapter(content_hash, False, placement)

    def unloaded(self, content_hash: str) -> None:
        self._hashes.discard(content_hash)
