"""Names of one server follow those of the shared store: each means an old version until the new one is loaded.

A name of the adapters folder, or one that was given at run time, is no name of the store here. A version that cannot be
loaded takes nothing from its name. One that is unloaded here by name stays away until somebody pushes it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from ...errors import UserError
from ..adapter_names import AdapterNames
from ..adapter_paths import NAME
from .names import SharedNames
from .records import NamedVersion

RETRY_S = 5.0  # a version that could not be loaded is not tried again

logger = logging.getLogger(__name__)


class NameFollower:
    """`give` loads a directory and gives the name to it, `take` takes the name away; `is_held`: requests can use what
    the name means without a load."""

    def __init__(
        self,
        shared: SharedNames,
        names: AdapterNames,
        is_held: Callable[[str], bool],
        give: Callable[[str, Path], Awaitable[object]],
        take: Callable[[str], Awaitable[object]],
    ):
        self._shared, self._names, self._is_held = shared, names, is_held
        self._give, self._take = give, take
        self._folders = shared.versions.folders
        self._put_away: dict[str, NamedVersion] = {}
        self._switches: dict[str, asyncio.Task[None]] = {}
        self._failures: dict[str, tuple[Path, UserError, float]] = {}

    def all(self) -> list[str]:
        """Names of the store that can be asked for. Waits for it: to be called on a thread."""
        return [name for name in self._shared.all() if name not in self._put_away and NAME.fullmatch(name)]

    def is_followed(self, name: str) -> bool:
        """Whether `name` means a version now."""
        directory = self._names.given_directory(name)
        return directory is not None and self._folders.version_of(directory) is not None

    async def meaning(self, name: str) -> NamedVersion | None:
        """What the store says of a name that can be asked for. Raises `UserError` where nobody knows."""
        meant = await self._shared.meaning(name)
        return None if meant is not None and self._put_away.get(name) == meant else meant

    async def follow(self, name: str) -> None:
        """Let `name`, which means nothing here or a version, mean what it means in the store.

        Waits for the load where nothing else can serve meanwhile. Raises `UserError`.
        """
        meant = await self.meaning(name)
        given = self._names.given_directory(name)
        if meant is None:
            if given is not None:
                await self._take(name)
                logger.info("adapter %r: its name has gone from the shared store", name)
            return
        directory = self._folders.path(meant.version)
        if given == directory:
            return
        failed = self._failures.get(name)
        if failed is not None and failed[0] == directory and time.monotonic() < failed[2]:
            if given is None:
                raise failed[1]
            return
        switch = self._switches.get(name)
        if switch is None:
            switch = self._switches[name] = asyncio.create_task(self._switch(name, directory))
            switch.add_done_callback(lambda done: (self._switches.pop(name), done.cancelled() or done.exception()))
        if given is None:
            await asyncio.shield(switch)
        elif not self._is_held(name):
            await asyncio.wait((switch,))

    async def _switch(self, name: str, directory: Path) -> None:
        try:
            await self._give(name, directory)
        except UserError as error:
            logger.warning("adapter %r: version %s is not served: %s", name, directory.name[:12], error)
            self._failures[name] = directory, error, time.monotonic() + RETRY_S
            raise
        self._failures.pop(name, None)
        self._put_away.pop(name, None)

    async def put_away(self, name: str) -> bool:
        """Follow it no more until it is pushed again; whether the store has it."""
        meant = await self._shared.meaning(name)
        if meant is not None:
            self._put_away[name] = meant
        return meant is not None
