"""Adapter names and which loaded weights they mean.

A name means a directory (`adapter_names`), and is resolved to the content hash of what is in it now: when files change,
the name means another adapter from the next request on, and the next request waits until the change is complete. Uses
of one adapter that is not loaded load it once; a slow or failing load holds up nobody else, and takes nothing from a
name that others gave away meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..adapter_files import ChangingError, Stamp, changing, read_texts
from ..adapter_messages import AdapterInfo
from ..errors import UserError
from .adapter_loader import AdapterLoader
from .adapter_names import AdapterNames
from .adapter_pins import AdapterPins
from .disk import Disk
from .engine_client.serving_engine import ServingEngine
from .loaded_names import LoadedNames, UseCounts
from .name_changes import NameChanges
from .name_loads import AFTER_ALL, NameLoads, start
from .shared_store.follower import NameFollower
from .shared_store.names import SharedNames

MAX_LOADS = 4  # that a request sees overtaken by changes
PINS_AT_ONCE = 4  # that are loaded again; requests have the other threads of the engine that read

logger = logging.getLogger(__name__)

T = TypeVar("T")


class AdapterStore:
    """Resolves adapter names for one engine; `base_name` is the base model's and no adapter's."""

    def __init__(
        self,
        engine: ServingEngine,
        adapters_dir: str | None,
        base_name: str,
        observe_load_s: Callable[[float], object] = lambda seconds: None,
        roots: Sequence[Path] = (),
        shared: SharedNames | None = None,
    ):
        """`shared`: names of a store that other servers have, too."""
        self._engine = engine
        self._versions = shared.versions if shared is not None else None
        fixed_stamp = self._versions.folders.stamp if self._versions is not None else lambda directory: None
        self._names = AdapterNames(adapters_dir, base_name, roots, fixed_stamp)
        self._disk = Disk(self._mount_of)
        self._pins = AdapterPins(engine)
        self._loaded = LoadedNames(lambda: engine.generation)
        self.uses = UseCounts()
        self._loader = AdapterLoader(
            engine, self._disk, self._pins, self._loaded, observe_load_s, self._names.stamp, self._there
        )
        changes = self._changes = NameChanges(self._names, self._disk, self._loader, self._loaded, self._pins)
        self._follower = (
            NameFollower(shared, self._names, self._is_held, changes.give, changes.take) if shared is not None else None
        )
        self._loads = NameLoads(engine, self._disk, self._loader, self._names)
        self._pin_places = asyncio.Semaphore(PINS_AT_ONCE)

    def names(self) -> list[str]:
        """Every name that can be asked for now. Looks at the disk: `look` keeps the event loop from waiting for it."""
        shared = self._follower.all() if self._follower is not None else []
        return sorted({*self.own_names(), *shared}) if shared else self.own_names()

    def own_names(self) -> list[str]:
        """The same without those of a shared store, which may be slow to tell."""
        return self._names.all()

    def given_names(self) -> set[str]:
        """Those of them that were given at run time, to directories that may lie anywhere."""
        return self._names.given()

    @property
    def roots(self) -> Sequence[Path]:
        """The folders that adapters must lie in, resolved; none: anywhere."""
        return self._names.paths.roots

    def given_directories(self) -> set[Path]:
        """Those that names were given to at run time, or are about to be."""
        return self._names.given_directories()

    def path(self, name: str) -> Path:
        """The directory of a known name; raises 404 otherwise. Looks at the disk."""
        return self._names.path(name)

    async def look(self, function: Callable[..., T], *args: Any) -> T:
        """One of the methods above, on a thread. Raises 503 when the disk is away."""
        return await self._disk.look(str(args[0]) if args else "", function, *args)

    async def resolve(self, name: str, priority: int = 0) -> AdapterInfo:
        """The loaded adapter that `name` means now; loads it if needed, for a request of that `priority`.

        Raises `UserError`.
        """
        num_loads = 0
        while True:
            directory, stamp = await self._look_up(name)
            if self._names.given_directory(name) not in (None, directory):
                continue  # it was given to another meanwhile
            loaded = self._loaded.held(name)
            if loaded is not None and loaded.directory == directory:
                if loaded.stamp == stamp:
                    return loaded.info
                num_loads += 1
                if num_loads > MAX_LOADS:
                    raise changing(name)
            # What was loaded may be of a moment before this request: look again.
            await self._loads.wait(name, directory, priority)

    async def resolve_with_texts(
        self, name: str, known: Container[str], priority: int = 0
    ) -> tuple[AdapterInfo, dict[str, bytes] | None]:
        """As `resolve`, with the template and tokenizer files of that moment; None where `known` has their hash."""
        for _ in range(MAX_LOADS):
            info = await self.resolve(name, priority)
            if info.text_hash is None or info.text_hash in known:
                return info, None
            with contextlib.suppress(ChangingError):
                directory = await self._disk.look(name, self.path, name)
                async with self._there(directory):
                    text_hash, files = await self._disk.look(name, read_texts, directory, name, self._names.paths.roots)
                if text_hash == info.text_hash:
                    return info, files
            # Then they changed since they were loaded, which `resolve` sees.
        raise changing(name)

    def placement(self, content_hash: str) -> int:
        """By which the engine holds this, as far as is known: what `engine_lost` is told if that turns out wrong."""
        return self._loaded.placement(content_hash)

    def engine_lost(self, content_hash: str, placement: int) -> None:
        """The engine takes no requests with `content_hash` by `placement`; the next one loads it again."""
        self._loaded.lost(content_hash, placement)

    def adapters_left(self, placements: Mapping[str, int]) -> None:
        """The engine says that it no longer holds these contents by these placements."""
        for content_hash, placement in placements.items():
            for pinned in self._loaded.lost(content_hash, placement) & self._pins.names:  # unloaded for another name
                start(self._bring_back(pinned))

    def engine_started(self) -> None:
        """A new engine process serves, which holds nothing: pinned adapters come back before they are asked for."""
        for pinned in sorted(self._pins.names):
            start(self._bring_back(pinned))

    async def _bring_back(self, pinned: str) -> None:
        async with self._pin_places:
            if pinned in self._pins.names:
                await self.resolve(pinned, AFTER_ALL)

    async def prefetch(self, name: str) -> bool:
        """Begin to load what `name` means now, if idle adapters make room; True when it is loaded already.

        Raises 404 for an unknown name.
        """
        directory, stamp = await self._look_up(name)
        loaded = self._loaded.held(name)
        if loaded is not None and loaded.is_of(directory, stamp):
            return True
        self._loads.begin(name, directory, AFTER_ALL)
        return False

    async def pin(self, name: str) -> AdapterInfo:
        """Load what `name` means, and keep it, and whatever the name will mean, where steps can use it.

        What was pinned before stays so when this fails.
        """
        await self.check_known(name)
        try:
            with self._pins.attempt(name):
                info = await self._load_and_keep(name)
        except BaseException:
            start(self._loader.follow_pins(name))  # the engine may have been told already
            raise
        await self._loader.follow_pins(name)  # it may be unpinned meanwhile
        return info

    async def _load_and_keep(self, name: str) -> AdapterInfo:
        for _ in range(MAX_LOADS):
            info = await self.resolve(name)
            placement = self._loaded.placement(info.content_hash)
            try:
                await self._pins.keep(info.content_hash, placement)
            except UserError as error:
                if error.code != "adapter_not_resident":
                    raise
                self.engine_lost(info.content_hash, placement)
            else:
                return info
        raise changing(name)

    async def unpin(self, name: str) -> None:
        """Let others take its place again; a name that is not pinned stays as it is."""
        await self.check_known(name)
        self._pins.unpin(name)
        await self._loader.follow_pins(name)

    def is_pinned(self, name: str) -> bool:
        return name in self._pins.names

    def _mount_of(self, name: str) -> Hashable:
        """The file system that a name was last loaded from, as far as is known."""
        known = self._loaded.known(name)
        return known.stamp[0][1] if known is not None and known.stamp else name

    def loading(self) -> dict[str, int]:
        """Names whose adapter is on its way now, and how many requests wait for it."""
        return self._loads.num_waiting()

    def known(self, name: str) -> AdapterInfo | None:
        """What `name` was when it was last loaded, whoever holds that now."""
        loaded = self._loaded.known(name)
        return loaded.info if loaded is not None else None

    def names_alike(self, name: str) -> frozenset[str]:
        """All names that mean what `name` means, while the engine holds that."""
        loaded = self._loaded.held(name)
        return frozenset() if loaded is None else self._loaded.names_of(loaded.info.content_hash)

    def check_name(self, name: str) -> None:
        """Raises `UserError` for a name that no adapter may have."""
        self._names.check_name(name)

    async def register(self, name: str, path: str, *, replace: bool = False) -> AdapterInfo:
        """Load the directory `path`, then give `name` to it; a name that is taken is refused unless `replace`.

        The name keeps its old meaning until the load is done, and when it fails.
        """
        return await self._changes.register(name, path, replace)

    async def unregister(self, name: str) -> None:
        """Take the name away at once, also from a load that has not ended; requests that run with it finish."""
        if self._names.claims.directory(name) is None:
            await self.check_known(name)
        if self._follower is not None and (self._follower.is_followed(name) or not await self._is_here(name)):
            await self._follower.put_away(name)
        await self._changes.take(name)
        logger.info("adapter %r: unloaded", name)

    # -- names of the shared store

    async def check_known(self, name: str) -> None:
        """Raises 404 for a name that cannot be asked for."""
        if self._follower is None or await self._is_here(name) or await self._follower.meaning(name) is None:
            await self._disk.look(name, self.path, name)

    async def _look_up(self, name: str) -> tuple[Path, Stamp]:
        """The directory that `name` means now, and what is in it. Raises `UserError`."""
        if self._follower is not None and (self._follower.is_followed(name) or not await self._is_here(name)):
            await self._follower.follow(name)
        return await self._disk.look(name, self._names.look_up, name)

    async def _is_here(self, name: str) -> bool:
        """Whether it means something, whatever the shared store says. Raises for what cannot be a name."""

        def look(name: str) -> bool:
            try:
                self.path(name)
            except UserError as error:
                if error.code != "model_not_found":
                    raise
                return False
            return True

        return await self._disk.look(name, look, name)

    def _is_held(self, name: str) -> bool:
        return self._loaded.held(name) is not None

    def _there(self, directory: Path) -> contextlib.AbstractAsyncContextManager[object]:
        return self._versions.there(directory) if self._versions is not None else contextlib.nullcontext()
