"""What was served, as tokens on disk, for a head that is fitted to it: a file for each (weights, tenant), bounded.

The weights are a LoRA's, by the SHA-256 of its file, or the bare base's, by their fingerprint: bases that share a
folder name other tokens by the same ids.

Off unless a folder is named. The tenant is the request's `cache_salt`, as of drafts that are learned. Files are their
user's alone. A thread of its own writes: a disk that is slow or full costs records and never a step. A file that is
full becomes its own predecessor, whose content goes; where all are too large, those that were written to longest ago
go. Files begin with whose they are and hold whole records: one that does not fit on the disk is taken back, and half a
one, of an engine that was killed, is cut off by the next. Engines that share a folder write one after the other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import queue
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import msgspec

from ..drafters.history_file import MAX_TOKEN_ID
from ..errors import UserError
from ..file_lock import FileLock
from ..whole_files import append_whole, cut_torn_end

SUFFIX, OLD_SUFFIX = ".served", ".served.old"
MAX_FILES = 1024  # clients may name a salt for each request
MAX_TOKENS = 32_768  # of a record; longer ones are left out
_SHARE = 8  # one file takes this part of all bytes at most, its predecessor included
_WAITING = 1024  # records in memory, of 128 KiB at most; more are left out
_T = TypeVar("_T")
_Waiting = tuple[str, str, float, "array[int]", "array[int]"]  # weights, tenant, and what `Served` has

logger = logging.getLogger(__name__)


class Served(NamedTuple):
    """A finished output and its prompt, token ids."""

    at: float  # seconds since 1970
    prompt: list[int]
    output: list[int]


class _Header(msgspec.Struct):
    """The first line of a file."""

    weights_hash: str
    tenant: str


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    """Each further one: `Served`, as it is read."""

    at: float
    prompt: list[Annotated[int, msgspec.Meta(ge=0)]]
    output: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(min_length=2)]


class ServingLog:
    """Writes to `directory`, at most `max_bytes` in all."""

    def __init__(self, directory: Path, max_bytes: int):
        self._directory, self._max_bytes = directory, max_bytes
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(_WAITING)
        self._is_warned = False
        self._thread = threading.Thread(target=self._write_all, name="serving-log", daemon=True)
        self._thread.start()

    def add(self, weights_hash: str, tenant: str, prompt: Sequence[int], output: Sequence[int]) -> None:
        """Keep an output of the weights with this hash; returns at once."""
        if len(output) < 2 or len(prompt) + len(output) > MAX_TOKENS:
            return
        try:
            self._queue.put_nowait((weights_hash, tenant, time.time(), array("i", prompt), array("i", output)))
        except queue.Full:
            self._warn("the disk is too slow; outputs are left out")

    def close(self) -> None:
        """Write what waits."""
        self._queue.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._write(*item)
            except OSError as error:
                self._warn(f"{error.strerror}; outputs are left out")

    def _write(self, weights_hash: str, tenant: str, at: float, prompt: array[int], output: array[int]) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._directory / _file_name(weights_hash, tenant)
        line = json.dumps(Served(at, prompt.tolist(), output.tolist())._asdict()).encode() + b"\n"
        with FileLock(self._directory) as lock:
            with suppress(UserError):  # a file system without locks: there an engine has a folder to itself
                lock.wait()
            size = path.stat().st_size if path.exists() else 0
            if size and size + len(line) > self._max_bytes // (2 * _SHARE):
                os.replace(path, path.with_suffix(OLD_SUFFIX))
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with open(fd, "ab+", buffering=0) as file:
                is_new = cut_torn_end(file) == 0
                if is_new:
                    line = json.dumps({"weights_hash": weights_hash, "tenant": tenant}).encode() + b"\n" + line
                try:
                    append_whole(file, line)
                finally:
                    if is_new:
                        self._remove_old()

    def _remove_old(self) -> None:
        """Called for each new file, so that what is beyond the bound is at most one file for each tenant since."""
        files = sorted(_files(self._directory), key=lambda found: found[1].st_mtime)
        total = sum(status.st_size for _, status in files)
        while files and (len(files) > MAX_FILES or total > self._max_bytes * (_SHARE - 1) // _SHARE):
            path, status = files.pop(0)
            path.unlink(missing_ok=True)
            total -= status.st_size

    def _warn(self, reason: str) -> None:
        if not self._is_warned:
            logger.warning("the serving log in %s takes no more for now: %s", self._directory, reason)
        self._is_warned = True


def read_served(
    directory: Path, weights_hash: str, key: str | None = None, vocab_size: int = MAX_TOKEN_ID + 1
) -> list[Served]:
    """What was served of these weights, the oldest first; `key`: of the key of that name alone.

    Lines that are no record of ids below `vocab_size` are left out. Raises `OSError` for a folder or file that cannot
    be read; one that an engine has removed meanwhile is none.
    """
    found: list[Served] = []
    for path, _ in _files(directory):
        lines = _lines(path)
        header = _decoded(next(lines, b""), _Header)
        if (
            header is None
            or header.weights_hash != weights_hash
            or (key is not None and not _is_of(header.tenant, key))
        ):
            continue
        for record in (_decoded(line, _Record) for line in lines):
            if record is not None and max(*record.prompt, *record.output, 0) < vocab_size:
                found.append(Served(record.at, record.prompt, record.output))
    return sorted(found, key=lambda served: served.at)


def _is_of(tenant: str, key: str) -> bool:
    """Salts of keys begin with the length of their name and the name."""
    return tenant.startswith(f"{len(key)}:{key}:")


def _decoded(line: bytes, type: type[_T]) -> _T | None:
    try:
        return msgspec.json.decode(line, type=type)
    except (msgspec.MsgspecError, RecursionError):
        return None


def _lines(path: Path) -> Iterator[bytes]:
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        return
    with file:
        yield from file


def _files(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in directory.iterdir():
        if path.name.endswith((SUFFIX, OLD_SUFFIX)):
            try:
                yield path, path.stat()
            except FileNotFoundError:
                continue


def _file_name(weights_hash: str, tenant: str) -> str:
    return hashlib.sha256(f"{weights_hash}\0{tenant}".encode()).hexdigest()[:40] + SUFFIX
