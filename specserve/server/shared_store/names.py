"""What names of the shared store mean, as a server sees it: no older than `refresh_s`, unless the store is away.

One look at the store for all who ask meanwhile. A store that does not answer changes nothing: what was known goes on,
and nobody waits for it but those whose names are not known yet.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import dataclass

from ...errors import UserError
from .records import NamedVersion
from .versions import Versions

PATIENCE_S = 1.0  # with a store that is slow, where the name is known
MAX_KNOWN = 65_536

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Known:
    meant: NamedVersion | None  # None: there is no such name
    at: float  # time.monotonic()


class SharedNames:
    """Of the store of `versions`; names are checked already."""

    def __init__(self, versions: Versions, refresh_s: float):
        self.versions = versions
        self._refresh_s = refresh_s
        self._known: dict[str, _Known] = {}  # looked at last last
        self._looks: dict[str, asyncio.Task[None]] = {}
        self._is_away = False
        self._all: tuple[list[str], float] | None = None
        self._listing = threading.Lock()

    async def meaning(self, name: str) -> NamedVersion | None:
        """What `name` means; None where there is no such name. Raises `UserError` where nobody knows."""
        known = self._known.get(name)
        if known is not None and time.monotonic() - known.at < self._refresh_s:
            return known.meant
        look = self._looks.get(name)
        if look is None:
            look = self._looks[name] = asyncio.create_task(self._look(name))
            look.add_done_callback(lambda done: (self._looks.pop(name), done.cancelled() or done.exception()))
        if known is None or known.meant is None:
            await asyncio.shield(look)
        else:
            await asyncio.wait((look,), timeout=0.0 if self._is_away else PATIENCE_S)
            self._is_away = self._is_away or not look.done()
        return self._known[name].meant

    async def _look(self, name: str) -> None:
        try:
            meant = await self.versions.ask(lambda: self.versions.store.named(name))
        except UserError as error:
            if not self._is_away:
                logger.warning("the name %r could not be looked up: %s", name, error)
            self._is_away = True
            raise
        self._is_away = False
        self._known.pop(name, None)
        self._known[name] = _Known(meant, time.monotonic())
        if len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]

    def all(self) -> list[str]:
        """Every name of the store, or the last that were heard of. Waits for the store: to be called on a thread."""
        with self._listing:
            if self._all is None or time.monotonic() - self._all[1] >= self._refresh_s:
                try:
                    found = self.versions.store.names()
                except UserError as error:
                    logger.warning("the names of the shared store could not be looked up: %s", error)
                    found = self._all[0] if self._all is not None else []
                self._all = found, time.monotonic()
            return self._all[0]
