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
from collections.abc import Mapping
from pathlib import Path

from ...adapter_files import ALL_FILES, check_complete, open_adapter
from ...errors import AdapterError, UserError
from ..adapter_paths import check_name
from ..sources.fetching import FetchedFile, failed, hash_of_files, measured
from .records import LIST_FILE, NamedVersion, Version, is_version
from .store_files import StoreFiles

DAMAGED = "fetch_failed"  # of errors of what is read


class SharedStore:
    """At an address of fsspec's, or in a local folder. Raises `UserError`, whose text has nothing of a library's."""

    def __init__(self, url: str):
        self.url, self.files = url, StoreFiles(url)

    # -- reading

    def named(self, name: str) -> NamedVersion | None:
        """What `name` means; None where there is no such name."""
        found = self.files.record(_name_path(name), NamedVersion)
        if found is not None and not is_version(found.version):
            raise failed(f"the name {name!r} in {self.url} means no version; push its adapter again")
        return found

    def names(self) -> list[str]:
        """Of all adapters."""
        return sorted(self.files.entries("names"))

    def versions(self) -> list[str]:
        """Of all contents, also of those that are not whole."""
        return sorted(version for version in self.files.entries("versions") if is_version(version))

    def version(self, version: str) -> Version | None:
        """The list of its files; None where there is no such version, or not yet. Raises where it is damaged."""
        found = self.files.record(_list_path(version), Version)
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
                self.files.fetch(f"{_folder(version)}/{name}", target / name, file.size)
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
                self.files.write(_name_path(name), NamedVersion(version, time.time()))
                if not self.is_whole(version):  # removed by who had looked at the names before
                    self._put_files(version, files.paths)
                    self._put_list(version, record)
        return version, is_new

    def _put_files(self, version: str, paths: Mapping[str, Path]) -> None:
        for file, path in paths.items():
            self.files.put_file(f"{_folder(version)}/{file}", path)

    def _put_list(self, version: str, record: Version) -> None:
        """Raises `UserError` where the files that it names are not there then."""
        self.files.write(_list_path(version), record)
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
        self.files.write(_name_path(name), NamedVersion(found[0], time.time()))
        if not self.is_whole(found[0]):
            raise failed(f"version {found[0][:12]} was pruned meanwhile in {self.url}; push its adapter as {name!r}")
        return found[0]

    def remove(self, name: str) -> bool:
        """Take the name away; whether there was one. What it meant stays until it is pruned."""
        return self.files.remove(_name_path(name))

    def prune(self, older_than_s: float, *, is_dry: bool = False) -> list[str]:
        """Remove what no name means and nobody has pushed lately, pushes that never ended included; what went.

        The lists of their files go first, so that whoever comes later sees none of them; what has got a name until then
        gets its list back. So a push sees the list gone behind its name, or its name is seen here.
        """
        now, named = time.time(), self._named_versions()
        gone = [
            version
            for version in self.versions()
            if version not in named and now - self.files.changed_at(_folder(version)) >= older_than_s
        ]
        if is_dry:
            return gone
        lists = {version: self.files.take(_list_path(version)) for version in gone}
        named = self._named_versions()
        for version, body in lists.items():
            if version not in named:
                self.files.remove_folder(_folder(version))
            elif body is not None:
                self.files.put_bytes(_list_path(version), body)
        self.files.remove_unfinished(older_than_s)
        return [version for version in gone if version not in named]

    def _named_versions(self) -> set[str]:
        return {meant.version for name in self.names() if (meant := self.named(name)) is not None}

    def is_whole(self, version: str, *, reads: bool = False) -> bool:
        """Whether its list is there, and all files with the sizes that it names; with the hashes, where it `reads`."""
        with self.files.telling():
            try:
                found = self.version(version)
                if found is None or not reads:
                    return found is not None and all(
                        self.files.size(f"{_folder(version)}/{name}") == file.size for name, file in found.files.items()
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


def _folder(version: str) -> str:
    return f"versions/{version}"


def _list_path(version: str) -> str:
    return f"{_folder(version)}/{LIST_FILE}"


def _name_path(name: str) -> str:
    return f"names/{name}"
