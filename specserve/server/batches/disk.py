"""The folder of --batch-dir: who may use it, what lies in it, and how much.

    lock            held by the server that uses it
    state.sqlite3   files and batches, and answers of batches that run (`store.py`)
    files/ID        the content of a file
    incoming/ID     content that is being written

A file's content is whole: it is moved in when it is on the disk, before the database knows of it. What the database
does not know when the folder is opened was never told to anybody, and goes.
"""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ...errors import UserError
from ...file_lock import FileLock
from .room import DirAwayError, DiskFullError, Room, StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ID = re.compile(r"file-[0-9a-f]{32}")


class BatchDir:
    """Raises `UserError` where the folder cannot be used, or another process uses it."""

    def __init__(self, path: Path, max_bytes: int, max_owner_bytes: int | None = None):
        self.path, self.room = path, Room(max_bytes, max_owner_bytes)
        self._files, self._incoming = path / "files", path / "incoming"
        try:
            for folder in (path, self._files, self._incoming):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = FileLock(path / "lock", 0o600)
            is_ours = self._lock.take()
        except OSError as error:
            raise UserError(f"--batch-dir {str(path)!r} cannot be used: {error.strerror}", param="batch_dir") from None
        if not is_ours:
            self._lock.close()
            raise UserError(
                f"--batch-dir {str(path)!r} is used by another process; give each server its own", param="batch_dir"
            )

    def close(self) -> None:
        self._lock.close()

    def file(self, file_id: str) -> Path:
        return self._files / file_id

    def open(self, file_id: str) -> BinaryIO | None:
        """The content of a file; None where that alone is gone. Raises `DirAwayError`."""
        with disk_errors():
            try:
                return self.file(file_id).open("rb")
            except FileNotFoundError:
                if not self._files.is_dir():
                    raise
        return None

    def tidy(self, known: Collection[str]) -> None:
        """Delete files of ours that nobody knows."""
        for path in (*self._incoming.iterdir(), *self._files.iterdir()):
            if _ID.fullmatch(path.name) and (path.parent == self._incoming or path.name not in known):
                path.unlink()

    def delete(self, file_id: str) -> None:
        self.file(file_id).unlink(missing_ok=True)

    def incoming(self, owner: str | None = None) -> Incoming:
        """`owner` is charged for it; None: nobody is, until it is kept."""
        file_id = f"file-{uuid.uuid4().hex}"
        return Incoming(self, file_id, self._incoming / file_id, owner)


class Incoming:
    """Content of a new file. What nobody has `kept` when it is closed is deleted. Raises `StorageError`."""

    def __init__(self, folder: BatchDir, file_id: str, path: Path, owner: str | None):
        self.id, self.owner = file_id, owner
        self.num_bytes = 0
        self._folder, self._path = folder, path
        with disk_errors():
            self._file = path.open("xb")
        self._is_kept = False

    def write(self, data: bytes) -> None:
        """Raises `StorageError`."""
        self._folder.room.count(len(data), self.owner)
        self.num_bytes += len(data)
        with disk_errors():
            self._file.write(data)

    def finish(self) -> None:
        """Put it in its place, whole and on the disk. Raises `StorageError`."""
        with disk_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            place = self._folder.file(self.id)
            os.replace(self._path, place)
            self._path = place
            folder = os.open(place.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def kept(self) -> None:
        """The database knows of it."""
        self._is_kept = True

    def close(self) -> None:
        with suppress(StorageError), disk_errors():  # of what was not written yet
            self._file.close()
        if not self._is_kept:
            self._path.unlink(missing_ok=True)
            self._folder.room.count(-self.num_bytes, self.owner)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Whoever writes to a full disk within gets a `DiskFullError`, and a `DirAwayError` where files cannot be used."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        is_full = error.errno in _FULL if isinstance(error, OSError) else _code(error) == sqlite3.SQLITE_FULL
        if is_full:
            raise DiskFullError("the disk of --batch-dir is full; make room on it") from None
        if isinstance(error, OSError):  # no path: clients read it
            raise DirAwayError(f"the folder of --batch-dir cannot be used: {error.strerror}; try later") from None
        raise


def _code(error: sqlite3.OperationalError) -> int:
    """SQLite's primary result code; 0 where the module itself complains."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
