"""The store and the worker of one server: opened, stopped, and opened anew where another folder is in their place.

While the folder is away nothing is answered, and what runs waits: it may come back as it was. Where another store lies
in its place, as after a backup was put back or a disk was mounted again, that one is taken, and its batches go on.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path

from ...config import ServeConfig
from ...errors import UserError
from ..access.keys import KeyRing
from ..engine_client.serving_engine import ServingEngine
from ..route import Answer
from .disk import BatchDir
from .places import Places
from .retention import KeepLimits
from .room import DirAwayError
from .row_runner import RowRunner
from .store import STATE_FILE, BatchStore
from .worker import BatchWorker

logger = logging.getLogger(__name__)

BESIDE_SHARE = 4  # one in so many of the engine's seats is for rows while there are other requests
LOOK_S = 5.0  # whether another folder is in place


class BatchService:
    """Of one server. Raises `UserError` where --batch-dir cannot be used.

    `num_others` says how many requests that somebody waits for are in the server.
    """

    def __init__(self, config: ServeConfig, engine: ServingEngine, keys: KeyRing, num_others: Callable[[], int]):
        self._config, self._engine, self._keys, self._num_others = config, engine, keys, num_others
        self._path = Path(config.batch_dir or "").expanduser()
        self._store: BatchStore | None = self._opened() if config.batch_dir is not None else None
        self._worker: BatchWorker | None = None
        self._following: asyncio.Task[None] | None = None

    def open(self) -> tuple[BatchStore, BatchWorker]:
        """Raises `UserError` where there are none."""
        if self._store is not None and self._worker is not None:
            return self._store, self._worker
        if self._config.batch_dir is not None:
            raise DirAwayError("the folder of --batch-dir was replaced and cannot be used; the server's log says more")
        raise UserError(
            "this server keeps no files and runs no batches; start it with --batch-dir FOLDER",
            status=404,
            code="unsupported",
        )

    async def start(self, answers: Mapping[str, Answer]) -> None:
        """Go on with what has not ended; rows are answered by `answers`, by URL."""
        if self._store is None:
            return
        await self._begin(self._store, answers)
        self._following = asyncio.ensure_future(self._follow(answers))

    async def stop(self) -> None:
        """No row runs any more."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        if self._worker is not None:
            await self._worker.stop()

    async def close(self) -> None:
        await self.stop()
        await self._end()

    def _opened(self) -> BatchStore:
        config = self._config
        disk_bytes = int(config.batch_disk_gib * 2**30)
        if config.batch_key_gib is not None:
            key_bytes = int(config.batch_key_gib * 2**30)
        else:
            key_bytes = disk_bytes // (2 if config.api_keys_file is not None else 1)
        kept_bytes = int(config.batch_keep_gib * 2**30) if config.batch_keep_gib is not None else None
        folder = BatchDir(self._path, disk_bytes, key_bytes)
        return BatchStore(folder, limits=KeepLimits(config.batch_key_files, kept_bytes))

    async def _begin(self, store: BatchStore, answers: Mapping[str, Answer]) -> None:
        runner = RowRunner(self._engine, answers, self._keys.named, Places(self._num_places))
        self._worker = BatchWorker(
            store,
            runner,
            max_rows=self._config.batch_max_rows,
            max_row_bytes=int(self._config.max_body_mib * 2**20),
            max_at_once=self._num_seats,
        )
        await self._worker.start()

    async def _end(self) -> None:
        store, worker, self._store, self._worker = self._store, self._worker, None, None
        if worker is not None:
            await worker.close()
        elif store is not None:
            store.close()

    async def _follow(self, answers: Mapping[str, Answer]) -> None:
        seen, problem = None, ""
        while True:
            await asyncio.sleep(LOOK_S)
            last, seen = seen, await asyncio.to_thread(self._other_in_place)
            if seen is None or seen != last:  # it may be that somebody is still copying it
                continue
            await self._end()
            try:
                self._store = await asyncio.to_thread(self._opened)
                await self._begin(self._store, answers)
                logger.warning("another folder is in the place of --batch-dir, and is used from now on")
            except (UserError, OSError, sqlite3.Error) as error:
                await self._end()
                if str(error) != problem:
                    logger.error("another folder is in the place of --batch-dir: %s", problem := str(error))

    def _other_in_place(self) -> list[tuple[str, int, int, int]] | None:
        """The files of a store that is not the open one, as they are now; None where there is no such store."""
        if self._store is not None and not self._store.is_replaced:
            return None
        try:
            found = {path.name: path.stat() for path in self._path.glob(f"{STATE_FILE}*")}
        except OSError:
            return None
        states = [(name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in sorted(found.items())]
        return states if STATE_FILE in found else None

    def _num_seats(self) -> int:
        info = self._engine.known_info
        return info.max_num_seqs if info is not None else 1

    def _num_places(self) -> int:
        return max(1, self._num_seats() // (BESIDE_SHARE if self._num_others() else 1))
