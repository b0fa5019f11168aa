"""The profiles of the adapters that can be asked for now, read again as adapters come, change and go.

Owns what is known of them; files are looked at on the store's threads, at most every `LOOK_EVERY_S` and at once when a
name is given or taken at run time. A profile that cannot be read is logged once and left out: its adapter is never
chosen, and can be named as before. Where the disk does not answer in time, what was known stays.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from ...adapter_files import POOLING_FILE, read_extra
from ...errors import AdapterError, OverloadedError, UserError
from ...routing_profile import MAX_PROFILE_BYTES, PROFILE_FILE, parse_profile
from ..adapter_store import AdapterStore
from .likeness import Likeness, likeness_of

LOOK_EVERY_S = 1.0
LOOK_TIMEOUT_S = 2.0  # that a request waits for one
MOST_TIME = 0.05  # share of it that looks may take
MAX_PROFILES = 1024  # 32 KiB each

logger = logging.getLogger(__name__)

Version = tuple[Path, int, int, int, int]  # directory, inode, size, modification and change time


@dataclass(frozen=True, slots=True)
class Known:
    """What a name's profile was when it was read; `likeness` is None where it was no good."""

    version: Version
    likeness: Likeness | None


class Profiles:
    """Of the adapters of one store."""

    def __init__(self, store: AdapterStore):
        self._store = store
        self._known: dict[str, Known] = {}
        self._look: asyncio.Task[None] | None = None  # the one that runs
        self._looked = -math.inf  # when the last one began, of time.monotonic()
        self._took_s = 0.0
        self._names_then: set[str] = set()

    async def now(self, max_age_s: float = LOOK_EVERY_S) -> dict[str, Known]:
        """By name, those that there are; none of it was read longer ago than `max_age_s`, where the disk answers.

        Longer where there are so many that a look takes a good part of that time. Nobody changes what was returned.
        """
        oldest = time.monotonic() - (max(max_age_s, self._took_s / MOST_TIME) if max_age_s else 0.0)
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                while self._looked < oldest or self._names_then != self._store.given_names():
                    self._look = self._look or asyncio.create_task(self._look_again())
                    await asyncio.shield(self._look)
        except TimeoutError:
            logger.warning("routing: profiles are being read for more than %g s; the old ones count", LOOK_TIMEOUT_S)
        return self._known

    async def _look_again(self) -> None:
        names, began = self._store.given_names(), time.monotonic()
        try:
            self._known = await self._store.look(self._read_all, "", self._known)
        except OverloadedError as error:
            logger.warning("routing: the profiles stay as they were: %s", error)
        finally:
            self._looked, self._names_then, self._look = began, names, None
            self._took_s = time.monotonic() - began

    async def is_still(self, name: str, known: Known) -> bool:
        """Whether the adapter's profile is the one that is `known`; looks at the disk."""
        return await self._store.look(self._version, name) == known.version

    def _read_all(self, _: str, before: dict[str, Known]) -> dict[str, Known]:
        found: dict[str, Known] = {}
        for name in self._store.names():
            version = self._version(name)
            if version is None:
                continue
            if len(found) == MAX_PROFILES:
                logger.warning("routing: more than %d adapters have a %s; the first count", MAX_PROFILES, PROFILE_FILE)
                break
            known = before.get(name)
            found[name] = known if known is not None and known.version == version else self._read(name, version)
        return found

    def _version(self, name: str) -> Version | None:
        """None for an adapter that is not there, that does not generate, or that has no profile."""
        try:
            directory = self._store.path(name)
            if (directory / POOLING_FILE).exists():
                return None
            status = os.stat(directory / PROFILE_FILE)
        except (UserError, OSError):
            return None
        return directory, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    def _read(self, name: str, version: Version) -> Known:
        try:
            body = read_extra(version[0], name, PROFILE_FILE, MAX_PROFILE_BYTES, self._store.roots)
            if body is None:
                return Known(version, None)
            return Known(version, likeness_of(parse_profile(body, f"{PROFILE_FILE} of adapter {name!r}")))
        except AdapterError as error:
            logger.warning("routing: never chosen: %s", error)  # which names the adapter
            return Known(version, None)
