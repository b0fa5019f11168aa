"""A task history that goes on learning: the completions that were served, and the table of them.

Owns which completions are held, how many, and when the table is built again, on a thread; each table is whole.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..file_lock import FileLock
from .history_file import MAX_TOKEN_ID, Completion, HistoryError, PackedHistory, as_array
from .task_history import TaskHistory

logger = logging.getLogger(__name__)

LOCK_S = 5.0  # that another engine may take to write there; one that was stopped holds nobody up


class LearningHistory:
    """The history of one adapter and tenant, growing with what is served.

    The table holds the newest served completions and fills what they leave of `max_tokens` with the newest of `base`.
    Only served completions are saved: base comes with the adapter. At most one rebuild runs at a time.
    """

    def __init__(
        self,
        base: TaskHistory | None,
        max_tokens: int = 200_000,
        rebuild_every: int = 4096,
        path: Path | None = None,
        *,
        vocab_size: int = MAX_TOKEN_ID + 1,
    ) -> None:
        self._base = base.completions() if base is not None else []
        self._max_tokens = max_tokens
        self._rebuild_every = rebuild_every
        self._path = path
        self._lock = threading.Lock()  # the served completions and the counts below; never held while building
        self._rebuild_lock = threading.Lock()  # taken before _lock
        self._served: deque[np.ndarray] = deque()
        self._num_served = 0
        self._num_pending = 0
        self._worker_running = False
        if path is not None and path.exists():
            try:
                for completion in PackedHistory.parse(path.read_bytes(), vocab_size).completions():
                    self._append(completion)
            except (HistoryError, OSError) as error:
                logger.warning("task history not loaded, starting without it: %s: %s", path, error)
        self._current = TaskHistory.build([*self._base, *self._served], max_tokens)

    @property
    def current(self) -> TaskHistory:
        """The newest finished table."""
        return self._current

    def learn(self, completion: Completion) -> None:
        """Add a served completion; it is in `current` after the next rebuild. One beyond max_tokens is ignored."""
        array = as_array(completion)
        with self._lock:
            if not self._append(array):
                return
            self._num_pending += len(array)
            if self._num_pending < self._rebuild_every or self._worker_running:
                return
            self._worker_running = True
        try:
            threading.Thread(target=self._work, name="task-history", daemon=True).start()
        except RuntimeError as error:  # no thread to be had; the tokens stay pending
            logger.warning("task history not rebuilt: %s", error)
            with self._lock:
                self._worker_running = False

    def flush(self) -> None:
        """Bring everything learned into `current` and save it where a path was given; a full disk costs the file."""
        self._rebuild()
        if self._path is None:
            return
        with self._rebuild_lock:  # two flushes would share the temporary file
            with self._lock:
                served = list(self._served)
            try:
                self._save(self._path, served)
            except OSError as error:
                logger.warning("task history not saved, kept in memory: %s: %s", self._path, error.strerror)

    @staticmethod
    def _save(path: Path, served: list[np.ndarray]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent) as lock:  # two engines as well
            with suppress(UserError):  # a file system without locks: there an engine has a folder to itself
                deadline = time.monotonic() + LOCK_S
                while not lock.take():
                    if time.monotonic() > deadline:
                        raise TimeoutError(errno.ETIMEDOUT, "another process has the folder locked")
                    time.sleep(LOCK_S / 100)
            PackedHistory.of(served).write(path)

    def _append(self, array: np.ndarray) -> bool:
        if not 0 < len(array) <= self._max_tokens:
            return False
        self._served.append(array)
        self._num_served += len(array)
        while self._num_served > self._max_tokens:
            self._num_served -= len(self._served.popleft())
        return True

    def _rebuild(self) -> None:
        with self._rebuild_lock:
            with self._lock:
                if not self._num_pending:
                    return
                served = list(self._served)
                self._num_pending = 0
            self._current = TaskHistory.build([*self._base, *served], self._max_tokens)

    def _work(self) -> None:
        while True:
            try:
                self.flush()  # a process that is killed forgets only what came since the last rebuild
            except Exception:  # serving goes on with the table there is, and the next rebuild tries again
                logger.exception("task history rebuild failed")
            with self._lock:
                if self._num_pending < self._rebuild_every:
                    self._worker_running = False
                    return
