"""Task history that keeps learning from what is served, one table per (adapter, tenant).

The tenant is the request's `cache_salt`: who may not share a prefix cache may not share drafts either. Tables are
bounded in tokens and in number, the least recently used leaving memory for disk first. Reading and building happen on
a thread of their own; until a table is ready its adapter's own history drafts.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from ..drafters.learning_history import LearningHistory
from ..drafters.task_history import TaskHistory

MAX_TABLES = 64  # in memory
MAX_FILES = 1024  # on disk; the oldest are removed
SUFFIX = ".history"

logger = logging.getLogger(__name__)


class ServedHistories:
    """Owned by the engine; `directory` None keeps what is learned in memory only."""

    def __init__(self, directory: Path | None, vocab_size: int, max_tables: int = MAX_TABLES):
        self._directory = directory
        self._vocab_size = vocab_size
        self._max_tables = max_tables
        self._tables: OrderedDict[tuple[str, str], Future[LearningHistory]] = OrderedDict()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="served-history")

    def current(self, adapter_hash: str, tenant: str, base: TaskHistory | None) -> TaskHistory | None:
        """The newest finished table, or the adapter's own history while there is none."""
        future = self._table(adapter_hash, tenant, base)
        if not future.done() or future.exception() is not None:
            return base
        table = future.result().current
        return table if table.num_tokens else base

    def learn(self, adapter_hash: str, tenant: str, base: TaskHistory | None, completion: Sequence[int]) -> None:
        """Add a served completion; it is drafted from after the table is built again."""
        future = self._table(adapter_hash, tenant, base)
        if not future.done():
            future.add_done_callback(lambda done: self._learn(done, completion))
        else:
            self._learn(future, completion)

    def close(self) -> None:
        """Save everything. Takes as long as building the tables that have learned something."""
        for key in list(self._tables):
            self._save(self._tables.pop(key))
        self._executor.shutdown(wait=True)
        self._remove_old_files()

    def _table(self, adapter_hash: str, tenant: str, base: TaskHistory | None) -> Future[LearningHistory]:
        key = (adapter_hash, tenant)
        if key not in self._tables:
            path = None if self._directory is None else self._directory / self._file_name(*key)
            make = lambda: LearningHistory(base, path=path, vocab_size=self._vocab_size)  # noqa: E731
            self._tables[key] = self._executor.submit(make)
            while len(self._tables) > self._max_tables:
                _, oldest = self._tables.popitem(last=False)
                self._executor.submit(self._save, oldest)
        self._tables.move_to_end(key)
        return self._tables[key]

    @staticmethod
    def _file_name(adapter_hash: str, tenant: str) -> str:
        return hashlib.sha256(f"{adapter_hash}\0{tenant}".encode()).hexdigest()[:40] + SUFFIX

    @staticmethod
    def _learn(future: Future[LearningHistory], completion: Sequence[int]) -> None:
        if future.exception() is None:
            future.result().learn(completion)

    def _save(self, future: Future[LearningHistory]) -> None:
        try:
            future.result().flush()
        except Exception:  # serving goes on; the table of this adapter is lost
            logger.exception("a served task history was not saved")

    def _remove_old_files(self) -> None:
        if self._directory is None or not self._directory.is_dir():
            return
        files: list[tuple[float, Path]] = []
        for path in self._directory.glob(f"*{SUFFIX}"):
            with suppress(FileNotFoundError):  # another engine that shares the folder has removed it
                files.append((path.stat().st_mtime, path))
        for _, path in sorted(files)[: max(0, len(files) - MAX_FILES)]:
            path.unlink(missing_ok=True)
