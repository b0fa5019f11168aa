"""One replica as the front sees it: a client of its engine, which is found again when the way to it breaks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..config import ServeConfig, engine_part
from ..errors import UserError
from ..server.engine_client.client import EngineClient
from ..server.shared_store.folders import VersionFolders
from ..server.shared_store.versions import versions_dir
from .parts import served
from .replica_link import ReplicaLink
from .wire import Channel

RETRY_S = 1.0

logger = logging.getLogger(__name__)


class Member:
    """`start` once, `leave` once; `front` is the front's own name."""

    def __init__(self, name: str, config: ServeConfig, channel: Channel, front: str):
        self.name = name
        folders = VersionFolders(versions_dir(config), 0) if config.shared_store is not None else None
        version_of = folders.version_of if folders is not None else lambda directory: None
        self.client = EngineClient(
            engine_part(config),
            silence_timeout_s=config.engine_timeout_s,
            step_timeout_s=config.engine_step_timeout_s,
            launch=lambda: ReplicaLink.launch(channel, front, served(config), version_of),
        )
        self._num_running = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._starting: asyncio.Task[None] | None = None

    @property
    def num_losses(self) -> int:
        """How often its engine, or the way to it, has gone."""
        return self.client.generation - (self.client.state == "ready")

    def start(self) -> None:
        self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        while True:
            try:
                await self.client.start()
                return
            except UserError as error:
                logger.warning("replica %s is not there yet: %s", self.name, error)
            except Exception:  # a bug, or what a library raises: this replica's alone, and it may pass
                logger.exception("the way to replica %s fails", self.name)
            await asyncio.sleep(RETRY_S)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """A request runs on it."""
        self._num_running += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._is_idle.set()

    async def leave(self, patience_s: float) -> None:
        """Let go of it when its requests have ended, and after `patience_s` whatever runs."""
        if self._starting is not None:
            self._starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._starting
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._is_idle.wait()
        await self.client.stop()
