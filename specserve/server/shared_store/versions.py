"""Brings versions of a shared store to this machine, each once however many ask, and holds them while they are read.

The store's libraries may hang: they are asked on threads of their own, bounded in number and time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from ...cache_dirs import cache_dir
from ...config import ServeConfig
from ...errors import UserError
from ...readers import Readers
from ..sources.worker import cannot_keep
from .folders import VersionFolders
from .store import SharedStore

NUM_THREADS = 8
STUCK_S, MAX_STUCK = 30.0, 32
MAX_TRIES = 3  # to hold what has come, which others' need of room may take away before

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Versions:
    """Of one store, kept in `folders`."""

    def __init__(self, store: SharedStore, folders: VersionFolders, timeout_s: float):
        self.store, self.folders = store, folders
        self._timeout_s = timeout_s
        self._readers = Readers(NUM_THREADS, STUCK_S, max_stuck=MAX_STUCK, max_stuck_a_mount=MAX_STUCK)
        self._fetches: dict[str, asyncio.Task[None]] = {}

    @classmethod
    def of(cls, config: ServeConfig) -> Versions | None:
        """As the settings say. Raises `UserError` for a store that cannot be."""
        if config.shared_store is None:
            return None
        folders = VersionFolders(versions_dir(config), int(config.adapter_cache_gib * 2**30))
        return cls(SharedStore(config.shared_store), folders, config.adapter_fetch_timeout_s)

    async def ask(self, function: Callable[[], T]) -> T:
        """`function()`, which asks the store, on a thread. Raises `UserError` where it takes too long."""
        self._readers.look()
        future = asyncio.wrap_future(self._readers.submit(function, "store"))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await future
        except TimeoutError:
            text = f"the shared store has not answered for {self._timeout_s:g} s (--adapter-fetch-timeout-s)"
            raise UserError(text, param="shared_store", status=504, code="timeout") from None

    @asynccontextmanager
    async def local(self, version: str) -> AsyncIterator[Path]:
        """Its folder, which stays inside. Raises `UserError`."""
        for _ in range(MAX_TRIES):
            if (lock := self.folders.hold(version)) is not None:
                break
            await self._bring(version)
        else:
            text = "what is fetched makes room for others at once; raise --adapter-cache-gib"
            raise UserError(text, status=503, code="fetch_failed")
        with lock:
            yield self.folders.path(version)

    @asynccontextmanager
    async def there(self, directory: Path) -> AsyncIterator[None]:
        """A version's folder is on this disk inside, as other directories always are. Raises `UserError`."""
        if (version := self.folders.version_of(directory)) is None:
            yield
            return
        async with self.local(version):
            yield

    async def _bring(self, version: str) -> None:
        task = self._fetches.get(version)
        if task is None:
            task = self._fetches[version] = asyncio.create_task(self._fetch(version))
            task.add_done_callback(lambda done: (self._fetches.pop(version), done.cancelled() or done.exception()))
        await asyncio.shield(task)

    async def _fetch(self, version: str) -> None:
        start = time.monotonic()
        try:
            await self.ask(lambda: self._fetch_now(version))
        except OSError as error:
            raise cannot_keep(error) from None
        logger.info("version %s: fetched (%.2f s)", version[:12], time.monotonic() - start)

    def _fetch_now(self, version: str) -> None:
        self.folders.make(version, lambda place: self.store.fetch(version, place, self.folders.max_bytes))
        self.folders.make_room()

    async def stop(self) -> None:
        tasks = list(self._fetches.values())
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def versions_dir(config: ServeConfig) -> Path:
    """Where all versions of this machine are, resolved."""
    root = Path(config.adapter_cache_dir) / "versions" if config.adapter_cache_dir else cache_dir("versions")
    return root.resolve()
