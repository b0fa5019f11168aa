"""Adapters from elsewhere as local folders: each fetched by a process of its own, once however many ask.

A fetch that is slow, hangs or fails is its own requests' matter; it ends with the last of them, or with its time, and
leaves nothing behind. A folder stays while somebody holds it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from ...config import ServeConfig
from ...errors import OverloadedError, UserError, from_info
from ...own_modules import module_command
from ..to_the_end import to_the_end
from .cache import AdapterCache, default_root
from .locations import Location, allowed_sources, is_address
from .worker import MAX_MESSAGE_BYTES, Fetched, FetchFailed, FetchJob, cannot_keep

MAX_FETCHES = 8  # at a time; each is a process
WORKER = module_command("specserve.server.sources.worker")

logger = logging.getLogger(__name__)


class AdapterFetcher:
    """Fetches what the settings allow. Raises `UserError` for settings or a cache that cannot be used."""

    def __init__(self, config: ServeConfig):
        self._allowed = allowed_sources(config)
        self._timeout_s = config.adapter_fetch_timeout_s
        self._held: Counter[Path] = Counter()
        self._fetches: dict[Location, asyncio.Task[Path]] = {}
        self._waiting: Counter[Location] = Counter()
        self._changing = asyncio.Lock()  # what is in the cache: finding and holding a folder is one act
        self.cache: AdapterCache | None = None
        if self._allowed.prefixes or self._allowed.repositories:
            root = Path(config.adapter_cache_dir) if config.adapter_cache_dir else default_root()
            self.cache = AdapterCache(Path(os.path.abspath(root)), int(config.adapter_cache_gib * 2**30))

    @property
    def root(self) -> Path | None:
        """Where all fetched folders are."""
        return None if self.cache is None else self.cache.folders

    def close(self) -> None:
        if self.cache is not None:
            self.cache.close()

    @asynccontextmanager
    async def local(self, path: str, in_use: Callable[[], Collection[Path]]) -> AsyncIterator[str]:
        """`path`, or where it is an address the folder with the adapter that is there now, which stays inside.

        `in_use`: folders that names lead to, which stay too. Raises `UserError`.
        """
        if not is_address(path):
            yield path
            return
        folder = await self._shared(self._allowed.location(path), in_use)
        try:
            yield str(folder)
        finally:
            self._release(folder)

    async def _shared(self, location: Location, in_use: Callable[[], Collection[Path]]) -> Path:
        """One fetch for all that ask meanwhile; it goes on while one of them waits."""
        if location not in self._fetches:
            if len(self._fetches) >= MAX_FETCHES:
                raise OverloadedError(f"{MAX_FETCHES} adapters are being fetched; retry when one is there", status=503)
            self._fetches[location] = asyncio.create_task(self._fetch(location, in_use))
        task = self._fetches[location]
        self._waiting[location] += 1
        try:
            folder = await asyncio.shield(task)
            self._held[folder] += 1
            return folder
        finally:
            self._waiting[location] -= 1
            if not self._waiting[location]:
                del self._waiting[location]
                del self._fetches[location]
                if task.done():
                    if not task.cancelled() and task.exception() is None:
                        self._release(task.result())  # the fetch's own hold
                else:
                    task.cancel()

    def _release(self, folder: Path) -> None:
        self._held[folder] -= 1
        if not self._held[folder]:
            del self._held[folder]

    async def _fetch(self, location: Location, in_use: Callable[[], Collection[Path]]) -> Path:
        """The folder, held once. Raises `UserError`."""
        start = time.monotonic()
        try:
            folder, how = await self._fetch_or_find(location)
            try:
                async with self._changing:
                    await to_the_end(asyncio.to_thread(self._cache().make_room, {*in_use(), *self._held}))
            except BaseException:
                self._release(folder)
                raise
        except TimeoutError:
            raise UserError(
                f"the adapter at {location.url} did not come within {self._timeout_s:g} s (--adapter-fetch-timeout-s)",
                param="lora_path",
                status=504,
                code="timeout",
            ) from None
        except OSError as error:
            raise cannot_keep(error) from None
        logger.info("%s: %s (%.2f s)", location.url, how, time.monotonic() - start)
        return folder

    async def _fetch_or_find(self, location: Location) -> tuple[Path, str]:
        """The folder, held once, and how it came about. What the cache has of it stays there meanwhile."""
        cache = self._cache()
        async with self._changing:
            known = await to_the_end(asyncio.to_thread(cache.entry, location.url))
            if known is not None:
                self._held[cache.folder_of(known)] += 1
        folder: Path | None = None
        try:
            async with self._workplace() as place:
                job = FetchJob(location, self._allowed, str(place), known.states if known else {}, cache.max_bytes)
                async with asyncio.timeout(self._timeout_s):
                    fetched = await self._run(job)
                if fetched.files is None:
                    assert known is not None, "only what is known is not fetched again"
                    folder = await to_the_end(asyncio.to_thread(cache.use, known))
                    self._held[folder] += 1
                    return folder, "as it was"
                async with self._changing:
                    kept = asyncio.to_thread(cache.keep, location.url, fetched.states, fetched.files, place / "files")
                    folder = await to_the_end(kept)
                    self._held[folder] += 1
                return folder, "fetched"
        except BaseException:
            if folder is not None:
                self._release(folder)
            raise
        finally:
            if known is not None:
                self._release(cache.folder_of(known))

    @asynccontextmanager
    async def _workplace(self) -> AsyncIterator[Path]:
        """A folder that is gone afterwards, whatever happens."""
        making = asyncio.ensure_future(self._make_workplace())
        try:
            yield await asyncio.shield(making)
        finally:
            await to_the_end(_remove(making))

    async def _make_workplace(self) -> Path:
        async with self._changing:
            return await asyncio.to_thread(self._cache().workplace)

    def _cache(self) -> AdapterCache:
        assert self.cache is not None, "nothing is allowed without a cache"
        return self.cache

    async def _run(self, job: FetchJob) -> Fetched:
        worker = await asyncio.create_subprocess_exec(
            *WORKER, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=MAX_MESSAGE_BYTES
        )
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(msgspec.json.encode(job) + b"\n")  # and stays open: its end is the worker's
            answer = await worker.stdout.readline()
        except ValueError:  # it has no end
            answer = b""
        finally:
            if worker.returncode is None:
                worker.kill()
            await worker.wait()
        try:
            result: Fetched | FetchFailed = msgspec.json.decode(answer, type=Fetched | FetchFailed)
        except msgspec.DecodeError:
            raise UserError(
                "the process that fetches the adapter ended without an answer; the server's log says more",
                status=502,
                code="fetch_failed",
            ) from None
        if isinstance(result, FetchFailed):
            raise from_info(result.error)
        return result


async def _remove(making: asyncio.Task[Path]) -> None:
    """The folder that `making` makes, if it does."""
    await asyncio.wait([making])
    if making.exception() is None:
        await asyncio.to_thread(shutil.rmtree, making.result(), ignore_errors=True)
