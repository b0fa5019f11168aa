"""Versions of a shared store on this machine's disk: a folder for each, whole or not there, for all processes alike.

The server and the replicas of a machine have one such cache. A folder is made beside its place and renamed, by one
process at a time for all; who waits for it goes on alone where nothing comes any more. Who uses one holds a lock on it,
which ends with the process, and only what nobody holds makes room, the one used longest ago first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from ...adapter_files import Stamp
from ...file_lock import FileLock
from .records import LIST_FILE, Version, is_version

STILL_S = 30.0  # without another byte, until whoever waits for a folder makes one of its own
_LOOK_S = 0.05
MIN_LEFT_S = 60.0  # since a folder was begun, until one that nobody holds counts as left by a process that was killed


class VersionFolders:
    """Up to `max_bytes` in `root`, which is made when something comes."""

    def __init__(self, root: Path, max_bytes: int):
        self.root, self.max_bytes = Path(os.path.abspath(root)), max_bytes
        self._partial = self.root / "partial"

    def path(self, version: str) -> Path:
        """Where it is, or would be."""
        return self.root / version

    def version_of(self, directory: Path) -> str | None:
        """The version whose folder that is; None for any other directory."""
        return directory.name if directory.parent == self.root and is_version(directory.name) else None

    def stamp(self, directory: Path) -> Stamp | None:
        """What stands for its files, which never change; None for other directories."""
        version = self.version_of(directory)
        return None if version is None else ((version, 0, 0, 0, 0, 0),)

    def hold(self, version: str) -> FileLock | None:
        """Its folder, which stays until that is closed; None where it is not there, or not whole."""
        path = self.path(version)
        while (lock := _locked(path, FileLock.share)) is not None:
            if _is_whole(path):
                os.utime(path)
                return lock
            if not self._take_away(path, lock):  # it is damaged
                return None
        return None

    def make(self, version: str, fill: Callable[[Path], Version]) -> None:
        """Let `fill` put its files into a new folder, unless another process is making it: that one is waited for."""
        self._partial.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._remove_left()
        place, lock = self._turn(version)
        with lock:
            try:
                if (held := self.hold(version)) is not None:  # another was first
                    held.close()
                    return
                for path in place.iterdir():  # of a process that was killed
                    path.unlink()
                (place / LIST_FILE).write_bytes(msgspec.json.encode(fill(place)))
                for path in place.iterdir():
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                with contextlib.suppress(OSError):  # there is one, which is never empty
                    os.rename(place, self.path(version))
            finally:
                if lock.is_in_place:
                    shutil.rmtree(place, ignore_errors=True)

    def _turn(self, version: str) -> tuple[Path, FileLock]:
        """The folder that a version is made in, taken from all others; one apart where nothing comes into it."""
        place, size, since = self._partial / version, -1, time.monotonic()
        while time.monotonic() - since < STILL_S:
            place.mkdir(exist_ok=True, mode=0o700)
            if (lock := _locked(place, FileLock.take)) is not None:
                return place, lock
            with contextlib.suppress(OSError):  # it is made or removed now
                if (now := _size_of(place)) != size:
                    size, since = now, time.monotonic()
            time.sleep(_LOOK_S)
        place = Path(tempfile.mkdtemp(dir=self._partial))
        lock = FileLock(place)
        lock.take()
        return place, lock

    def make_room(self) -> None:
        """Remove folders that nobody holds until the others fit."""
        found = []
        for path in self._folders():
            with contextlib.suppress(OSError):  # another process removes it
                found.append((path.stat().st_mtime, _size_of(path), path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.max_bytes:
                return
            if (lock := _locked(path, FileLock.take)) is not None and self._take_away(path, lock):
                total -= size

    def _folders(self) -> list[Path]:
        try:
            return [path for path in self.root.iterdir() if is_version(path.name)]
        except FileNotFoundError:
            return []

    def _take_away(self, path: Path, lock: FileLock) -> bool:
        """Remove the folder that `lock` is on, unless another holds it, too; closes `lock`."""
        with lock:
            try:
                if not lock.take():
                    return False
                self._partial.mkdir(parents=True, exist_ok=True, mode=0o700)
                gone = Path(tempfile.mkdtemp(dir=self._partial)) / path.name
                os.rename(path, gone)  # whoever comes meanwhile finds all of it or nothing
            except OSError:
                return False
            shutil.rmtree(gone.parent, ignore_errors=True)
            return True

    def _remove_left(self) -> None:
        for path in self._partial.iterdir():
            try:
                is_old = time.time() - path.stat().st_mtime > MIN_LEFT_S
            except OSError:
                continue
            if is_old and (lock := _locked(path, FileLock.take)) is not None:
                with lock:
                    shutil.rmtree(path, ignore_errors=True)


def _locked(path: Path, take: Callable[[FileLock], bool]) -> FileLock | None:
    """A lock on the folder that is there now; None where there is none to have."""
    if not path.is_dir():
        return None
    try:
        lock = FileLock(path)
    except OSError:  # it has gone
        return None
    if take(lock) and lock.is_in_place:
        return lock
    lock.close()
    return None


def _size_of(folder: Path) -> int:
    """Bytes of its files. Raises `OSError` where another process removes it."""
    return sum(file.stat().st_size for file in folder.iterdir())


def _is_whole(folder: Path) -> bool:
    """Whether its files have the sizes that their list says: hashes were checked when they came."""
    try:
        found = msgspec.json.decode((folder / LIST_FILE).read_bytes(), type=Version)
        return all((folder / name).stat().st_size == file.size for name, file in found.files.items())
    except (OSError, msgspec.DecodeError):
        return False
