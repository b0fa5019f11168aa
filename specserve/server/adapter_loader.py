"""From a directory to what the engine holds of it, and back: loads that wait out changes, and what is let go.

A directory is loaded once it holds still, and its stamp is that of what was read. What no name means any more is let
go, and what no pinned name means is pinned no more. Which name means which directory is the store's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from ..adapter_files import Stamp, age_s, changing
from ..errors import NO_IDLE_ROOM, EngineDeadError, UserError
from .adapter_pins import AdapterPins
from .disk import Disk
from .engine_client.serving_engine import ServingEngine
from .loaded_names import Loaded, LoadedNames

SETTLE_S = 1.0  # files that changed later than this ago may be half of something
# That a load waits out, each for up to `SETTLE_S`. Not by the clock, which also runs while the server is stopped.
MAX_CHANGES = 30

logger = logging.getLogger(__name__)


class AdapterLoader:
    """Of one store, whose `pins` and `loaded` names it keeps in step with the engine."""

    def __init__(
        self,
        engine: ServingEngine,
        disk: Disk,
        pins: AdapterPins,
        loaded: LoadedNames,
        observe_load_s: Callable[[float], object],
        stamp_of: Callable[[Path], Stamp],
        there: Callable[[Path], AbstractAsyncContextManager[object]],
    ):
        """`stamp_of` looks at a directory; inside `there` it is on this disk, wherever it came from."""
        self._stamp_of, self._there = stamp_of, there
        self._engine, self._disk, self._pins, self._loaded = engine, disk, pins, loaded
        self._observe_load_s = observe_load_s

    async def load(
        self,
        name: str,
        directory: Path,
        *,
        reads: bool = False,
        is_awaited: Callable[[], bool] = lambda: True,
        priority: Callable[[], int] = lambda: 0,
    ) -> Loaded:
        """Load what is in `directory` once it holds still; where it `reads`, also what seems to be what it was.

        `priority` is the best of the requests that wait for it by then; where none does, it waits for no room.
        """
        async with self._there(directory):
            return await self._load(name, directory, reads, is_awaited, priority)

    async def _load(
        self, name: str, directory: Path, reads: bool, is_awaited: Callable[[], bool], priority: Callable[[], int]
    ) -> Loaded:
        start = time.monotonic()
        for _ in range(MAX_CHANGES):
            stamp = await self._disk.look(name, self._stamp_of, directory)
            age = age_s(stamp)
            if 0 <= age < SETTLE_S:
                await asyncio.sleep(SETTLE_S - age)
                if await self._disk.look(name, self._stamp_of, directory) != stamp:
                    continue
            try:
                known = self._loaded.known(name) if not reads else None
                before = known.info if known is not None and known.is_of(directory, stamp) else None
                is_pinned = name in self._pins.names
                answer = await self._engine.load_adapter(
                    name,
                    str(directory),
                    before,
                    is_pinned=is_pinned,
                    is_prefetch=not is_awaited(),
                    priority=priority(),
                    mount=stamp[0][1] if stamp else 0,
                )
            except UserError as error:
                if error.code == "adapter_places_pinned" and await self._let_go_of_old_files(name, directory, stamp):
                    continue
                is_same = await self._disk.look(name, self._stamp_of, directory) == stamp
                has_come_late = error.code == NO_IDLE_ROOM and is_awaited()  # whoever waits for room
                if is_same and not has_come_late:
                    logger.info("adapter %r: not loaded: %s", name, error)
                    raise
                continue
            info = answer.adapter
            if before is not None and info.content_hash == before.content_hash:
                info = before  # what is held may have come with another chat template
            if is_pinned:
                self._pins.told(info.content_hash)
            loaded = Loaded(directory, stamp, self._engine.generation, info, answer.placement)
            self._loaded.arrived(loaded)
            try:
                is_same = await self._disk.look(name, self._stamp_of, directory) == stamp
            except BaseException:
                await self.release(loaded)
                raise
            if is_same:
                seconds = time.monotonic() - start
                self._observe_load_s(seconds)
                logger.info("adapter %r: loaded %s (%.2f s)", name, info.content_hash[:12], seconds)
                return loaded
            await self.release(loaded)
        raise changing(name)

    async def _let_go_of_old_files(self, name: str, directory: Path, stamp: Stamp) -> bool:
        """Whether a pin of `name` may hold the room that its new files need: nobody can ask for the old ones now."""
        old = self._loaded.held(name)
        if name not in self._pins.names or old is None or old.directory != directory or old.stamp == stamp:
            return False
        self._loaded.forget(name)
        await self.release(old)
        return True

    async def keep(self, name: str, loaded: Loaded) -> None:
        before = self._loaded.keep(name, loaded)
        if before is not None:
            await self.release(before)
        await self.follow_pins(name)  # it may be unpinned while it was loaded

    async def release(self, loaded: Loaded) -> None:
        """Let the engine forget an adapter that no name means any more, nor one that is about to be given."""
        self._loaded.settle(loaded)
        if loaded.generation != self._engine.generation:
            return
        content_hash = loaded.info.content_hash
        placement = self._loaded.placement(content_hash)
        with contextlib.suppress(EngineDeadError):
            if names := self._loaded.names_of(content_hash):
                await self._pins.follow(content_hash, names, placement)
            elif placement and not self._loaded.is_arriving(content_hash):
                self._pins.unloaded(content_hash)
                await self._engine.unload_adapter(content_hash, placement)

    async def follow_pins(self, name: str) -> None:
        """Let the engine keep what `name` means no longer if no pinned name means it."""
        loaded = self._loaded.held(name)
        if loaded is not None:
            content_hash = loaded.info.content_hash
            names, placement = self._loaded.names_of(content_hash), self._loaded.placement(content_hash)
            await self._pins.follow(content_hash, names, placement)
