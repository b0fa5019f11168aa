"""Which models of a board a process works on: the kernel's to know, by ranges of a lock file.

Another process's locks end at once with it, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


class ModelLocks:
    """Those of this process; close them at the end. Raises `OSError` where the lock file cannot be made."""

    def __init__(self, board: Path):
        self._file = os.open(board.with_name(board.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def take(self, number: int) -> bool:
        """False where another process has the model."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Gives all of them back."""
        with suppress(OSError):
            os.close(self._file)
