"""What adapter names were last loaded as, and which of these adapters the engine still holds.

Plain bookkeeping, no files and no engine. What a name was is remembered when the engine has let go of it, so that
the engine need not read it again where it has a copy. Invariant: a name that is held is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..adapter_files import Stamp
from ..adapter_messages import AdapterInfo
from .placements import Placements

MAX_KNOWN = 65_536  # names


@dataclass(frozen=True, slots=True)
class Loaded:
    directory: Path
    stamp: Stamp
    generation: int  # of the engine process that was asked
    info: AdapterInfo
    placement: int  # the number of its answer

    def is_of(self, directory: Path, stamp: Stamp) -> bool:
        """Whether the same directory with the same files would give the same."""
        return (self.directory, self.stamp) == (directory, stamp)


@dataclass(frozen=True, slots=True)
class Uses:
    """Requests of a name since the server started, and when the last one began, in seconds since 1970."""

    num_uses: int = 0
    last_used: float = 0.0


@dataclass(slots=True)
class _Process:
    """What is known of one engine process."""

    generation: int
    names: dict[str, set[str]] = field(default_factory=dict)  # content hash -> names that mean it
    placements: Placements = field(default_factory=Placements)


class LoadedNames:
    """By name and, for what is held, by content hash; `generation` is that of the engine process that serves."""

    def __init__(self, generation: Callable[[], int]) -> None:
        self._known: dict[str, Loaded] = {}
        self._generation = generation
        self._newest_process = _Process(generation())
        self._arriving: dict[int, str] = {}  # placement -> content hash, of loads that have not given their name yet

    @property
    def _process(self) -> _Process:
        if self._newest_process.generation != (now := self._generation()):  # what a former one held is held no more
            self._newest_process = _Process(now)
        return self._newest_process

    @property
    def _held(self) -> dict[str, set[str]]:
        return self._process.names

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

    def placement(self, content_hash: str) -> int:
        """The newest one that is known of what the engine holds; 0: it does not hold it."""
        return self._process.placements.newest(content_hash)

    def arrived(self, loaded: Loaded) -> None:
        """A load has ended, which is going to `keep` this under a name or to `settle` it without one."""
        self._arriving[loaded.placement] = loaded.info.content_hash
        if loaded.generation == self._generation():
            self._process.placements.arrived(loaded.info.content_hash, loaded.placement)

    def settle(self, loaded: Loaded) -> None:
        """The load that has brought it gives it no name, or has done so."""
        self._arriving.pop(loaded.placement, None)

    def is_arriving(self, content_hash: str) -> bool:
        """Whether a load that has brought it is about to give it a name."""
        return content_hash in self._arriving.values()

    def keep(self, name: str, loaded: Loaded) -> Loaded | None:
        """Note that `name` means this now; what it meant until now, if the engine holds that."""
        self.settle(loaded)
        before = self.forget(name)
        if len(self._known) >= MAX_KNOWN:  # names of folders that have long gone: none of them is worth keeping
            self._known = {known: one for known, one in self._known.items() if self.held(known) is not None}
        self._known[name] = loaded
        if loaded.generation == self._generation() and self.placement(loaded.info.content_hash):
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

    def lost(self, content_hash: str, placement: int) -> frozenset[str]:
        """The engine no longer holds this by `placement`; the names that meant it, if it holds it by no later one."""
        if not self._process.placements.left(content_hash, placement):
            return frozenset()
        return frozenset(self._held.pop(content_hash, ()))


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
