"""Locks on files and folders (flock): one process at a time, and the kernel gives a lock back however its holder ends.

Owns the handle, how a lock is taken, and who says that they hold it. What whoever finds it taken is told is the matter
of those who lock. A process that was given the handle holds the lock, too, until all of them have closed it; programs
that are started are given none by themselves.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Self

from .errors import UserError


class FileLock:
    """The handle of `path`, a folder that is there or a file that is made; close it to give the lock back.

    Raises `OSError` where it cannot be opened.
    """

    def __init__(self, path: Path, mode: int = 0o666):
        """`mode`: of a new file, within the umask."""
        self._path = path
        # For writing, without which NFS gives no exclusive lock; folders are the kernel's own even there.
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        self._fd = os.open(path, flags | os.O_CLOEXEC, mode)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def fileno(self) -> int:
        """For processes that are to hold the lock, too."""
        return self._fd

    def take(self) -> bool:
        """False where another process has it. Raises `UserError` where the file system knows no locks."""
        try:
            self._flock(fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def share(self) -> bool:
        """Hold it beside others that share it; False where another process has taken it."""
        try:
            self._flock(fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def wait(self) -> None:
        """Take it when whoever has it is done. Raises `UserError` as `take` does."""
        self._flock(fcntl.LOCK_EX)

    def _flock(self, operation: int) -> None:
        try:
            fcntl.flock(self._fd, operation)
        except BlockingIOError:
            raise
        except OSError as error:
            self.close()
            raise UserError(f"{self._path} cannot be locked: {error.strerror}; use another file system") from None

    @property
    def is_in_place(self) -> bool:
        """Whether the lock is on what is at its path now: what was removed is locked by nobody who comes later."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except OSError:  # it is gone, or closed
            return False

    def sign(self) -> None:
        """Write this process's id into the file, for others to tell."""
        self.unsign()
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def unsign(self) -> None:
        os.ftruncate(self._fd, 0)

    @property
    def holder(self) -> str:
        """The process id that was written last, or "unknown"."""
        return os.pread(self._fd, 32, 0).decode(errors="replace") or "unknown"

    def close(self) -> None:
        """Twice is once."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
