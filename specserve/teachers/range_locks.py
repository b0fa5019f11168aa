"""Locks on places of a file, among processes and within one: the kernel gives them back however their holder ends.

They are Linux's open file description locks: closing another handle of the file gives none of them back. Where a system
or a file system has none, everybody gets every lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

_TAKEN = (errno.EAGAIN, errno.EACCES)


class RangeLocks:
    """In the file `path`, which is made and holds nothing. Raises `OSError`."""

    def __init__(self, path: Path):
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._set_lock = getattr(fcntl, "F_OFD_SETLK", None)

    def take(self, place: int, *, shared: bool = False) -> bool:
        """Whether the lock of `place` (0 to 2**63 - 2) is ours now; one that is changes its kind."""
        return self._set(fcntl.F_RDLCK if shared else fcntl.F_WRLCK, place)

    def give_back(self, place: int) -> None:
        self._set(fcntl.F_UNLCK, place)

    def close(self) -> None:
        """Gives all back."""
        os.close(self._fd)

    def _set(self, kind: int, place: int) -> bool:
        if self._set_lock is None:
            return True
        try:
            fcntl.fcntl(self._fd, self._set_lock, struct.pack("hhqqi4x", kind, os.SEEK_SET, place, 1, 0))
        except OSError as error:
            return error.errno not in _TAKEN
        return True
