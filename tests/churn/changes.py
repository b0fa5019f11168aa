"""Workers that change adapters while they are served: their files, and their names through the routes.

One change at a time for each name, and its timeline told before the first system call and after the last.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from . import files
from .contents import TEMPLATE, Content
from .history import Disturbances, Timeline

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
SHELF = "shelf"  # a folder in adapters_dir that is no adapter itself
ROUTE_PATIENCE_S = 240.0


@dataclass(slots=True)
class Adapter:
    """A name that clients ask for. Those on the shelf exist through the load route alone."""

    name: str
    folder: Path
    timeline: Timeline = field(default_factory=Timeline)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    content: str = ""
    is_on_shelf: bool = False
    num_loads: int = 0


@dataclass(slots=True)
class Changer:
    """Everything that a worker needs; several run side by side."""

    url: str
    root: Path
    contents: Mapping[str, Content]
    adapters: list[Adapter]
    disturbances: Disturbances
    session: aiohttp.ClientSession
    note: Callable[[dict[str, object]], None]  # keeps a fault
    counts: Counter[str] = field(default_factory=Counter)
    num_refused: int = 0

    def prepare(self, rng: random.Random) -> None:
        """First contents of all folders; the shelf's are loaded by `load_shelf`."""
        names = rng.sample(sorted(self.contents), len(self.adapters))
        for adapter, content in zip(self.adapters, names, strict=True):
            shutil.copytree(self.contents[content].folder, adapter.folder)
            adapter.content = content
            adapter.timeline.set(time.monotonic(), None if adapter.is_on_shelf else content)

    async def load_shelf(self) -> None:
        for adapter in self.adapters:
            if adapter.is_on_shelf:
                await self._load(adapter, adapter.content)

    async def change_one(self, rng: random.Random) -> None:
        adapter = rng.choice([one for one in self.adapters if not one.lock.locked()])
        async with adapter.lock:
            if adapter.timeline.last.content is None:
                await self._load(adapter, adapter.content)  # an earlier load was refused
            elif rng.random() < 0.2:
                await self._change_by_route(adapter, rng)
            else:
                await self._change_files(adapter, rng)

    # -- files

    async def _change_files(self, adapter: Adapter, rng: random.Random) -> None:
        old = self.contents[adapter.content]
        family = [c.name for c in self.contents.values() if c.family == old.family]
        # A template that is cut short may be a good template of another text: those are replaced whole.
        in_file = ["replace file"] if old.file == TEMPLATE else list(files.IN_FILE)
        way = rng.choice([*in_file, *files.WHOLE])
        new = self.contents[rng.choice(sorted(self.contents) if way in files.WHOLE else family)]
        change = files.WHOLE.get(way) or files.IN_FILE[way]
        has_old_times = rng.random() < 0.3
        adapter.timeline.set(time.monotonic(), new.name, is_moving=True)

        def run() -> None:
            change(new.folder, adapter.folder, new.file, rng)
            if has_old_times:
                files.set_old_times(adapter.folder)

        await asyncio.to_thread(run)
        adapter.content = new.name
        adapter.timeline.set(time.monotonic(), new.name)
        self.counts[way + (", old times" if has_old_times else "")] += 1

    # -- routes

    async def _change_by_route(self, adapter: Adapter, rng: random.Random) -> None:
        if adapter.is_on_shelf and rng.random() < 0.6:  # another directory under the same name
            adapter.num_loads += 1
            folder = adapter.folder.with_name(f"{adapter.name}-{adapter.num_loads}")
            new = rng.choice(sorted(self.contents))
            await asyncio.to_thread(shutil.copytree, self.contents[new].folder, folder)
            old, adapter.folder = adapter.folder, folder
            if not await self._load(adapter, new, load_inplace=True):
                old, adapter.folder = adapter.folder, old
            await asyncio.to_thread(shutil.rmtree, old)
        elif rng.random() < 0.5:
            await self._load(adapter, adapter.content, load_inplace=True)
        else:
            adapter.timeline.set(time.monotonic(), None, is_moving=True, keeps_old=True)
            if await self._post(adapter, UNLOAD, {"lora_name": adapter.name}, (200, 404)):
                adapter.timeline.set(time.monotonic(), None)
                self.counts["unload"] += 1
            await asyncio.sleep(rng.uniform(0, 2))
            await self._load(adapter, adapter.content)

    async def _load(self, adapter: Adapter, content: str, load_inplace: bool = False) -> bool:
        """Whether `adapter.folder`, which holds `content`, is what the name means now."""
        adapter.timeline.set(time.monotonic(), content, is_moving=True, keeps_old=True)
        body = {"lora_name": adapter.name, "lora_path": str(adapter.folder.relative_to(self.root))}
        if load_inplace:
            body |= {"load_inplace": True}
        is_loaded = await self._post(adapter, LOAD, body, (200,))
        if is_loaded:
            adapter.content = content
            self.counts["load in place" if load_inplace else "load"] += 1
        has_content = is_loaded or load_inplace  # what a refused load leaves
        adapter.timeline.set(time.monotonic(), adapter.content if has_content else None)
        return is_loaded

    async def _post(self, adapter: Adapter, path: str, body: Mapping[str, object], wanted: tuple[int, ...]) -> bool:
        """Until there is one of the wanted answers. While the engine is away, again; any other answer is a fault."""
        deadline = time.monotonic() + ROUTE_PATIENCE_S
        while True:
            start, status, text = time.monotonic(), 0, ""
            try:
                async with self.session.post(self.url + path, json=body) as response:
                    status, text = response.status, await response.text()
            except (aiohttp.ClientError, TimeoutError) as error:
                text = repr(error)
            if status in wanted:
                return True
            away = self.disturbances.overlaps(start - 2, time.monotonic())
            if not (status in (0, 503) and away) or time.monotonic() > deadline:
                what = f"{path} of an adapter that stood still: {status} {text[:300]}"
                self.num_refused += 1
                self.note({"fault": "refused change", "name": adapter.name, "what": what})
                return False
            await asyncio.sleep(0.5)
