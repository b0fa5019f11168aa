"""What adapter names were last loaded as, and which of these adapters the engine still holds.

Plain bookkeeping, no files and no engine. What a name was is remembered when the engine has let go of it, so that
the engine need not read it again where it has a copy. Invariant: a name that is held is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..adapter_files import Stamp
from ..messages import AdapterInfo

MAX_KNOWN = 65_536  # names


@dataclass(frozen=True, slots=True)
class Loaded:
    directory: Path
    stamp: Stamp
    generation: int  # of the engine process that was asked
    info: AdapterInfo

    def is_of(self, directory: Path, stamp: Stamp) -> bool:
        """Whether the same directory with the same files would give the same."""
        return (self.directory, self.stamp) == (directory, stamp)


@dataclass(frozen=True, slots=True)
class Uses:
    """Requests of a name since the server started, and when the last one began, in seconds since 1970."""

    num_uses: int = 0
    last_used: float = 0.0


class LoadedNames:
    """By name and, for what is held, by content hash; `generation` is that of the engine process that serves."""

    def __init__(self, generation: Callable[[], int]) -> None:
        self._known: dict[str, Loaded] = {}
        self._generation = generation
        self._of_generation = generation()
        self._of_process: dict[str, set[str]] = {}  # content hash -> names

    @property
    def _held(self) -> dict[str, set[str]]:
        if self._of_generation != (now := self._generation()):  # what a former process held is held no more
            self._of_generation, self._of_process = now, {}
        return self._of_process

    def known(self, name: str) -> Loaded | None:
        """What the name was when it was last loaded."""
        return self._known.get(name)

    def held(self, name: str) -> Loaded | None:
        """The same, while the engine holds that."""
        loaded = self._known.get(name)
        return loaded if loaded is not None and name in self._held.get(loaded.info.content_hash, ()) else None

    def names_of(self, content_hash: str) -> frozenset[str]:
        """Names that mean an adapter which the engine holds."""
        return frozenset(self._held.get(content_hash, ()))

    def keep(self, name: str, loaded: Loaded) -> Loaded | None:
        """Note that `name` means this now; what it meant until now, if the engine holds that."""
        before = self.forget(name)
        if len(self._known) >= MAX_KNOWN:  # names of folders that have long gone: none of them is worth keeping
            self._known = {known: one for known, one in self._known.items() if self.held(known) is not None}
        self._known[name] = loaded
        if loaded.generation == self._generation():
            self._held.setdefault(loaded.info.content_hash, set()).add(name)
        return before

    def forget(self, name: str) -> Loaded | None:
        """Note that `name` means nothing now; what it meant until now, if the engine holds that."""
        held = self.held(name)
        self._known.pop(name, None)
        if held is not None:
            names = self._held[held.info.content_hash]
            names.discard(name)
            if not names:
                del self._held[held.info.content_hash]
        return held

    def lost(self, content_hash: str) -> None:
        """The engine no longer holds this."""
        self._held.pop(content_hash, None)


class UseCounts:
    """Requests by adapter name, of the names that were used last."""

    def __init__(self) -> None:
        self._uses: dict[str, Uses] = {}  # last used last

    def count(self, name: str) -> None:
        """A request with this adapter begins."""
        before = self._uses.pop(name, Uses())
        self._uses[name] = Uses(before.num_uses + 1, time.time())
        if len(self._uses) > MAX_KNOWN:
            del self._uses[next(iter(self._uses))]

    def of(self, name: str) -> Uses:
        return self._uses.get(name, Uses())
