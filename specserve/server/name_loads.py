"""The loads of names that are under way, and who waits for them.

A name and a directory are loaded once at a time, whoever asks; the engine is told the best priority of those who wait.
A name keeps what was loaded if it means that still.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..messages import BACKGROUND_PRIORITY
from .adapter_loader import AdapterLoader
from .adapter_names import AdapterNames
from .disk import Disk
from .engine_client.serving_engine import ServingEngine

AFTER_ALL = BACKGROUND_PRIORITY - 1  # a priority behind every request's, before rows of batches

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Loading:
    """A load that is under way."""

    waiting: list[int] = field(default_factory=list)  # priorities of the requests that wait for it
    task: asyncio.Task[None] = field(init=False)


class NameLoads:
    """Of one store."""

    def __init__(self, engine: ServingEngine, disk: Disk, loader: AdapterLoader, names: AdapterNames):
        self._engine, self._disk, self._loader, self._names = engine, disk, loader, names
        self._loading: dict[tuple[str, Path], _Loading] = {}
        self._told: dict[Path, int] = {}  # the best priority of those who wait for the loads of a directory

    def num_waiting(self) -> dict[str, int]:
        """Names whose adapter is on its way now, and how many requests wait for it: none where nobody asked yet."""
        num: dict[str, int] = {}
        for (name, _), loading in self._loading.items():
            num[name] = num.get(name, 0) + sum(priority != AFTER_ALL for priority in loading.waiting)
        return num

    async def wait(self, name: str, directory: Path, priority: int) -> None:
        """For the load of what the name means; raises its error. It goes on when those who wait for it leave, but waits
        no more for room that others could have."""
        loading = self.begin(name, directory, priority)
        loading.waiting.append(priority)
        self._waiters_changed(directory)
        try:
            await asyncio.shield(loading.task)
        finally:
            loading.waiting.remove(priority)
            if not loading.task.done():
                self._waiters_changed(directory)

    def begin(self, name: str, directory: Path, priority: int) -> _Loading:
        """The load of a name that is under way, or one that begins now."""
        loading = self._loading.get((name, directory))
        if loading is None:
            self._told.setdefault(directory, priority)
            loading = self._loading[name, directory] = _Loading()
            loading.task = start(self._load_named(name, directory, loading))
        return loading

    def _waiters_changed(self, directory: Path) -> None:
        """Tell the engine who waits for its loads of a directory, under whichever name, where that is news."""
        waiting = [priority for loading in self._loads_of(directory) for priority in loading.waiting]
        if not waiting:
            self._engine.forsake_loads(str(directory))
        elif (best := min(waiting)) != self._told.get(directory):
            self._told[directory] = best
            self._engine.prioritize_loads(str(directory), best)

    def _loads_of(self, directory: Path) -> list[_Loading]:
        return [loading for (_, loaded), loading in self._loading.items() if loaded == directory]

    async def _load_named(self, name: str, directory: Path, loading: _Loading) -> None:
        try:
            loaded = await self._loader.load(
                name,
                directory,
                is_awaited=lambda: bool(loading.waiting),
                priority=lambda: min(loading.waiting, default=AFTER_ALL),
            )
            try:
                folder = await self._disk.look(name, self._names.folder, name)
            except BaseException:
                await self._loader.release(loaded)
                raise
            if self._names.means(name, directory, folder):
                await self._loader.keep(name, loaded)
            else:  # unloaded or given away meanwhile
                await self._loader.release(loaded)
        finally:
            del self._loading[name, directory]
            if not self._loads_of(directory):
                self._told.pop(directory, None)


def start(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task that goes on when those who wait for it leave, and whose error is theirs alone."""
    task = asyncio.create_task(work)
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    return task
