"""Fetched adapters on disk, by content: a folder is complete and checked, or it is not there.

A folder's name is the hash of its files' hashes; `sources/` says what each address meant last. Folders are made beside
their place and renamed; what was left by a server that was killed goes when the next one opens the cache. Folders not
in use make room, the one used longest ago first. One server has the cache, for as long as it runs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import msgspec

from ...cache_dirs import cache_dir
from ...errors import UserError
from ...file_lock import FileLock
from ...whole_files import replace_file
from .fetching import FetchedFile, FileState, hash_of_files, measured


class Entry(msgspec.Struct, frozen=True):
    """What an address meant when it was fetched last."""

    url: str
    states: dict[str, FileState]
    files: dict[str, FetchedFile]

    @property
    def folder(self) -> str:
        return hash_of_files(self.files)


class AdapterCache:
    """Up to `max_bytes` in `root`. Raises `UserError` where another server has it, or it cannot be written."""

    def __init__(self, root: Path, max_bytes: int):
        self.max_bytes = max_bytes
        self._root = root
        self.folders, self._sources, self._partial = root / "adapters", root / "sources", root / "partial"
        self._open()
        for left in self._partial.iterdir():
            shutil.rmtree(left, ignore_errors=True)

    def _open(self) -> None:
        root = self._root
        try:
            for folder in (self.folders, self._sources, self._partial):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = FileLock(root / "lock")
            is_ours = self._lock.take()
        except OSError as error:
            raise UserError(f"adapters cannot be kept in {root}: {error.strerror}; give --adapter-cache-dir") from None
        if not is_ours:
            self._lock.close()
            raise UserError(f"another server keeps its adapters in {root}; give --adapter-cache-dir another")

    def close(self) -> None:
        self._lock.close()

    def entry(self, url: str) -> Entry | None:
        """What `url` meant last, if its folder is there with the bytes that were fetched."""
        try:
            entry = msgspec.json.decode(self._source(url).read_bytes(), type=Entry)
        except (OSError, msgspec.DecodeError):
            return None
        return entry if entry.url == url and self._is_whole(entry) else None

    def _is_whole(self, entry: Entry) -> bool:
        folder = self.folder_of(entry)
        try:
            return all(measured(folder / name) == file for name, file in entry.files.items())
        except OSError:
            return False

    def workplace(self) -> Path:
        """A new empty folder, for whoever asked to remove; `keep` takes `files` out of it."""
        if not (self._partial.is_dir() and self._lock.is_in_place):  # somebody removed the cache, as one may
            self._lock.close()
            self._open()
        return Path(tempfile.mkdtemp(dir=self._partial))

    def keep(self, url: str, states: Mapping[str, FileState], files: Mapping[str, FetchedFile], fetched: Path) -> Path:
        """Put the folder `fetched` in its place; returns that."""
        entry = Entry(url, dict(states), dict(files))
        folder = self.folder_of(entry)
        if not self._is_whole(entry):
            for name in files:
                with (fetched / name).open("rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(folder, ignore_errors=True)  # it is damaged
            fetched.rename(folder)
        replace_file(self._source(url), lambda path: path.write_bytes(msgspec.json.encode(entry)))
        return folder

    def folder_of(self, entry: Entry) -> Path:
        return self.folders / entry.folder

    def use(self, entry: Entry) -> Path:
        folder = self.folder_of(entry)
        os.utime(folder)
        return folder

    def make_room(self, in_use: Collection[Path]) -> None:
        """Remove folders that are not `in_use` until the others fit."""
        sizes = {folder: sum(file.stat().st_size for file in folder.iterdir()) for folder in self.folders.iterdir()}
        total = sum(sizes.values())
        for folder in sorted(sizes.keys() - set(in_use), key=lambda path: path.stat().st_mtime):
            if total <= self.max_bytes:
                return
            gone = folder.rename(self._partial / folder.name)  # whoever comes meanwhile finds all of it or nothing
            shutil.rmtree(gone, ignore_errors=True)
            total -= sizes[folder]

    def _source(self, url: str) -> Path:
        return self._sources / hashlib.sha256(url.encode()).hexdigest()


def default_root(environ: Mapping[str, str] = os.environ) -> Path:
    return cache_dir("fetched-adapters", environ)
