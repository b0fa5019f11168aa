"""Adapters that many servers share: each content once under the hash of its files, and names that point to hashes.

`versions/HASH/` has an adapter's files and, written last, their list; `names/NAME` has the hash that a name means. Any
file system of fsspec holds one, a folder or a bucket alike. Nothing is ever changed in place: a version is whole or it
is not there, a name means its old version or its new one, and whatever writer or reader is killed, whichever two write
at once. What is read is checked against the hash that was asked for.

A version without names stays until it is pruned, so that whoever has read a name can still read what it meant.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import msgspec

from ...adapter_files import ALL_FILES, MAX_CONFIG_BYTES, check_complete, open_adapter
from ...errors import AdapterError, UserError
from ..adapter_paths import check_name
from ..sources.fetching import FetchedFile, failed, hash_of_files, measured
from ..sources.other_sources import file_system, read_file
from .records import LIST_FILE, NamedVersion, Version, is_version

DAMAGED = "fetch_failed"  # of errors of what is read

T = TypeVar("T")


class SharedStore:
    """At an address of fsspec's, or in a local folder. Raises `UserError`, whose text has nothing of a library's."""

    def __init__(self, url: str):
        if "@" in url.partition("://")[2].partition("/")[0]:
            text = (
                "shared_store holds credentials; give them as the file system's package reads them, not in the address"
            )
            raise UserError(text, param="shared_store")
        self.url = url
        self._fs, self._root = file_system(url, "shared_store")
        self._is_local = "file" in _protocols(self._fs)

    # -- reading

    def named(self, name: str) -> NamedVersion | None:
        """What `name` means; None where there is no such name."""
        found = self._record(self._name_path(name), NamedVersion)
        if found is not None and not is_version(found.version):
            raise failed(f"the name {name!r} in {self.url} means no version; push its adapter again")
        return found

    def names(self) -> list[str]:
        """Of all adapters."""
        return sorted(self._entries("names"))

    def versions(self) -> list[str]:
        """Of all contents, also of those that are not whole."""
        return sorted(version for version in self._entries("versions") if is_version(version))

    def version(self, version: str) -> Version | None:
        """The list of its files; None where there is no such version, or not yet. Raises where it is damaged."""
        found = self._record(self._list_path(version), Version)
        if found is not None and (hash_of_files(found.files) != version or not found.files.keys() <= set(ALL_FILES)):
            raise failed(f"the list of files of version {version[:12]} in {self.url} is not the one that was pushed")
        return found

    def fetch(self, version: str, target: Path, max_bytes: int) -> Version:
        """Its files into the empty folder `target`, each checked by its hash. Raises `UserError`."""
        found = self.version(version)
        if found is None:
            raise failed(f"{self.url} has no version {version[:12]}; push it, or point its name to another")
        if (total := found.num_bytes) > max_bytes:
            raise failed(f"version {version[:12]} has {total} bytes, more than --adapter-cache-gib allows")
        for name, file in found.files.items():
            with contextlib.suppress(AdapterError):  # it is longer, and therefore another
                read_file(self._fs, f"{self._folder(version)}/{name}", target / name, file.size)
            if measured(target / name) != file:
                raise failed(
                    f"{name} of version {version[:12]} in {self.url} is damaged: it is not the {file.size} "
                    f"bytes with SHA-256 {file.sha256[:12]} that were pushed; push the adapter again"
                )
        return found

    # -- writing

    def push(self, directory: Path, name: str | None = None) -> tuple[str, bool]:
        """(the version of the adapter in `directory`, whether it is new); `name` means it from then on."""
        if name is not None:
            check_name(name, "NAME")
        with open_adapter(directory, directory.name) as files:
            check_complete(files, directory, directory.name)
            sizes = {file: os.stat(path).st_size for file, path in files.paths.items()}
            entries = {file: FetchedFile(sizes[file], files.digests[file].hex()) for file in files.paths}
            version = hash_of_files(entries)
            record = Version(entries, files.content_hash, time.time())
            is_new = not self.is_whole(version, reads=True)
            if is_new:
                self._put_files(version, files.paths)
            self._put_list(version, record)  # anew also if it is there: it is young now
            if name is not None:
                self._write(self._name_path(name), NamedVersion(version, time.time()))
                if not self.is_whole(version):  # removed by who had looked at the names before
                    self._put_files(version, files.paths)
                    self._put_list(version, record)
        return version, is_new

    def _put_files(self, version: str, paths: Mapping[str, Path]) -> None:
        for file, path in paths.items():
            self._put(f"{self._folder(version)}/{file}", partial(self._fs.put_file, str(path)))

    def _put_list(self, version: str, record: Version) -> None:
        """Raises `UserError` where the files that it names are not there then."""
        self._write(self._list_path(version), record)
        if not self.is_whole(version):
            raise failed(
                f"version {version[:12]} is not whole in {self.url}; somebody removed it meanwhile: push again"
            )

    def point(self, name: str, version: str) -> str:
        """Let `name` mean a version that is there, by its hash or the beginning of one; returns the whole hash."""
        check_name(name, "NAME")
        found = [known for known in self.versions() if known.startswith(version)]
        if len(found) != 1 or not self.is_whole(found[0]):
            problem = f"{len(found)} versions begin so" if len(found) > 1 else "there is no such version, or not whole"
            raise UserError(f"version {version[:64]!r}: {problem}; `specserve store list` shows them", param="VERSION")
        self._write(self._name_path(name), NamedVersion(found[0], time.time()))
        if not self.is_whole(found[0]):
            raise failed(f"version {found[0][:12]} was pruned meanwhile in {self.url}; push its adapter as {name!r}")
        return found[0]

    def remove(self, name: str) -> bool:
        """Take the name away; whether there was one. What it meant stays until it is pruned."""
        path = self._name_path(name)
        with self._telling():
            if not self._fs.exists(path):
                return False
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(path)
        return True

    def prune(self, older_than_s: float, *, is_dry: bool = False) -> list[str]:
        """Remove what no name means and nobody has pushed lately, pushes that never ended included; what went.

        The lists of their files go first, so that whoever comes later sees none of them; what has got a name until then
        gets its list back. So a push sees the list gone behind its name, or its name is seen here.
        """
        now, named = time.time(), self._named_versions()
        gone = [
            version
            for version in self.versions()
            if version not in named and now - self._changed_at(self._folder(version)) >= older_than_s
        ]
        if is_dry:
            return gone
        lists = {version: self._take_list(version) for version in gone}
        named = self._named_versions()
        for version, body in lists.items():
            if version not in named:
                with self._telling(), contextlib.suppress(FileNotFoundError):
                    self._fs.rm(self._folder(version), recursive=True)
            elif body is not None:
                self._put_bytes(self._list_path(version), body)
        self._remove_unfinished(older_than_s)
        return [version for version in gone if version not in named]

    def _named_versions(self) -> set[str]:
        return {meant.version for name in self.names() if (meant := self.named(name)) is not None}

    def _take_list(self, version: str) -> bytes | None:
        """The list of a version's files, as it was; None where it has none."""
        with self._telling(), contextlib.suppress(FileNotFoundError):
            body: bytes = self._fs.cat_file(self._list_path(version))
            self._fs.rm_file(self._list_path(version))
            return body
        return None

    def is_whole(self, version: str, *, reads: bool = False) -> bool:
        """Whether its list is there, and all files with the sizes that it names; with the hashes, where it `reads`."""
        with self._telling():
            try:
                found, folder = self.version(version), self._folder(version)
                if found is None or not reads:
                    return found is not None and all(
                        self._fs.info(f"{folder}/{name}")["size"] == file.size for name, file in found.files.items()
                    )
                with tempfile.TemporaryDirectory() as scratch:
                    self.fetch(version, Path(scratch), found.num_bytes)
                return True
            except FileNotFoundError:
                return False
            except UserError as error:
                if error.code == DAMAGED:
                    return False
                raise

    # -- files

    def _folder(self, version: str) -> str:
        return f"{self._root}/versions/{version}"

    def _list_path(self, version: str) -> str:
        return f"{self._folder(version)}/{LIST_FILE}"

    def _name_path(self, name: str) -> str:
        return f"{self._root}/names/{name}"

    def _entries(self, folder: str) -> list[str]:
        with self._telling():
            try:
                return [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(f"{self._root}/{folder}", False)]
            except FileNotFoundError:  # nobody has pushed yet
                return []

    def _changed_at(self, folder: str) -> float:
        """When something in it was written last, in seconds since 1970; now where nobody knows."""
        with self._telling():
            try:
                times = [_time_of(self._fs.info(path)) for path in self._fs.ls(folder, False) or [folder]]
            except FileNotFoundError:
                times = []
        return max(times, default=time.time())

    def _remove_unfinished(self, older_than_s: float) -> None:
        """What writers into a folder of files had begun when they were killed."""
        if not self._is_local:
            return
        with contextlib.suppress(FileNotFoundError):
            for path in Path(self._root, "unfinished").iterdir():
                if time.time() - path.stat().st_mtime > older_than_s:
                    path.unlink(missing_ok=True)

    def _record(self, path: str, kind: type[T]) -> T | None:
        with self._telling():
            try:
                if self._fs.info(path)["size"] > MAX_CONFIG_BYTES:
                    raise failed(f"{path} is no record of a shared store: it has more than {MAX_CONFIG_BYTES} bytes")
                return msgspec.json.decode(self._fs.cat_file(path), type=kind)
            except FileNotFoundError:
                return None
            except msgspec.DecodeError:
                raise failed(f"{path} is damaged; push the adapter again") from None

    def _write(self, path: str, record: Any) -> None:
        self._put_bytes(path, msgspec.json.encode(record))

    def _put_bytes(self, path: str, body: bytes) -> None:
        self._put(path, lambda target: self._fs.pipe_file(target, body))

    def _put(self, path: str, write: Callable[[str], object]) -> None:
        """The file at once: object stores have it whole when they have it, a folder of files by renaming."""
        with self._telling():
            if not self._is_local:
                write(path)
                return
            unfinished = Path(self._root, "unfinished", uuid4().hex)
            try:
                unfinished.parent.mkdir(parents=True, exist_ok=True)
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                write(str(unfinished))
                with unfinished.open("rb") as file:
                    os.fsync(file.fileno())
                os.replace(unfinished, path)
            except BaseException as error:
                unfinished.unlink(missing_ok=True)
                if isinstance(error, FileNotFoundError):
                    raise failed(f"{path} could not be written: somebody removed it meanwhile; push again") from None
                raise

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Errors of libraries as ours; of their texts, which may hold secrets, only those of the system."""
        try:
            yield
        except (UserError, FileNotFoundError):
            raise
        except Exception as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
            raise UserError(
                f"the shared store {self.url} does not answer: {reason}",
                param="shared_store",
                status=503,
                code="store_unavailable",
            ) from error


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _time_of(info: dict[str, Any]) -> float:
    """When a file was written, by what the file systems call that; now where one does not say."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        found: Any = info.get(key)
        if isinstance(found, datetime):
            return found.timestamp()
        if isinstance(found, int | float):
            return float(found)
        with contextlib.suppress(TypeError, ValueError):
            return datetime.fromisoformat(found).timestamp()
    return time.time()
