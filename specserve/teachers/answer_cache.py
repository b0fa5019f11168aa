"""Replies in SQLite by the hash of what was asked: whatever ends a program, what was paid for is here.

Every reply is committed as it comes, so that `kill -9` loses what was in flight alone. Several programs may share the
file; each has it open under a shared lock. What was used longest ago goes when the last one leaves and there is more
than is wanted, and never what was used since that one came. Terms that the user has agreed to are remembered here, too.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ..errors import UserError
from .range_locks import RangeLocks

Kept = TypeVar("Kept")
FILE = "answers.sqlite3"
LOCK_FILE = "answers.lock"
BUSY_S = 30.0
_OPEN = 1 << 62  # the place of who has the file open, behind those of all hashes
_HASH_DIGITS = 15
_SCHEMA = (
    "PRAGMA auto_vacuum = INCREMENTAL",
    # With a log, a commit survives the program's death without waiting for the disk.
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",
    "CREATE TABLE IF NOT EXISTS replies (hash TEXT PRIMARY KEY, teacher TEXT, reply BLOB, "
    "used_at REAL NOT NULL DEFAULT 0, num_bytes INTEGER NOT NULL DEFAULT 0)",
    "CREATE TABLE IF NOT EXISTS terms (teacher TEXT PRIMARY KEY, agreed_at REAL)",
)
_OLDER = (  # a file of before there was a limit
    "ALTER TABLE replies ADD COLUMN used_at REAL NOT NULL DEFAULT 0",
    "ALTER TABLE replies ADD COLUMN num_bytes INTEGER NOT NULL DEFAULT 0",
    "UPDATE replies SET num_bytes = length(reply)",
)


@dataclass(frozen=True, slots=True)
class KeptOf:
    """What there is of one teacher; `used_at` is when some of it was last used, in seconds of the epoch."""

    teacher: str
    num: int
    num_bytes: int
    used_at: float


class AnswerCache:
    """Of the file in `directory`, which is made; it is held to `max_bytes` when it is closed.

    Raises `UserError` where it cannot be used.
    """

    def __init__(self, directory: Path, max_bytes: int | None = None):
        self.path = directory / FILE
        self._max_bytes, self._opened_at = max_bytes, time.time()
        self._used: set[str] = set()
        with self._errors(OSError):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # answers tell of what was asked
            os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))  # the directory may have been there
            self._locks = RangeLocks(directory / LOCK_FILE)
        try:
            self._wait_for_others()
            with self._errors():
                self._db = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
                for statement in _SCHEMA:
                    self._db.execute(statement)
                self._renew()
        except BaseException:
            self._locks.close()
            raise

    def get(self, digest: str, kind: type[Kept]) -> Kept | None:
        """None for what is not there, and for an entry that cannot be read any more, which will be replaced."""
        with self._errors():
            row = self._db.execute("SELECT reply FROM replies WHERE hash = ?", (digest,)).fetchone()
        if row is None:
            return None
        self._used.add(digest)
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(row[0], type=kind)
        return None

    def put(self, digest: str, teacher: str, reply: Any) -> None:
        data = msgspec.json.encode(reply)
        with self._errors():
            self._db.execute(
                "INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?, ?)", (digest, teacher, data, time.time(), len(data))
            )

    def take(self, digest: str) -> bool:
        """Whether asking `digest` is ours; another program or teacher may be at it."""
        return self._locks.take(int(digest[:_HASH_DIGITS], 16))

    def give_back(self, digest: str) -> None:
        self._locks.give_back(int(digest[:_HASH_DIGITS], 16))

    def has_terms(self, teacher: str) -> bool:
        with self._errors():
            return self._db.execute("SELECT 1 FROM terms WHERE teacher = ?", (teacher,)).fetchone() is not None

    def agree(self, teacher: str) -> None:
        with self._errors():
            self._db.execute("INSERT OR REPLACE INTO terms VALUES (?, ?)", (teacher, time.time()))

    def kept(self) -> list[KeptOf]:
        """By teacher, the one that was used last first."""
        with self._errors():
            rows = self._db.execute(
                "SELECT teacher, COUNT(*), SUM(num_bytes), MAX(used_at) FROM replies GROUP BY teacher ORDER BY 4 DESC"
            ).fetchall()
        return [KeptOf(*row) for row in rows]

    @property
    def num_bytes(self) -> int:
        """On the disk, without room that is free for what comes."""
        with self._errors():
            size, num, num_free = (
                self._db.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_size", "page_count", "freelist_count")
            )
        return size * (num - num_free)

    def clear(self, teacher: str | None = None, unused_s: float = 0.0) -> int:
        """Remove replies of one teacher or all, of those that were not used for so long; returns how many.

        Raises `UserError` while another program has the file open.
        """
        if not self._locks.take(_OPEN):
            raise UserError(f"a teacher is being asked with {self.path}; wait for that, or end it", param="clear")
        with self._errors():
            query = "DELETE FROM replies WHERE used_at <= ? AND ifnull(?, teacher) = teacher"
            num = self._db.execute(query, (time.time() - unused_s, teacher)).rowcount
            self._give_back_pages()
        self._locks.take(_OPEN, shared=True)
        return num

    def close(self) -> None:
        """Hold the file to its size; where that fails, as on a full disk, another run does it."""
        try:
            with contextlib.suppress(sqlite3.Error, UserError):
                self._note_used()
                if self._max_bytes is not None and self._locks.take(_OPEN):
                    self._trim(self.num_bytes - self._max_bytes)
        finally:
            self._db.close()
            self._locks.close()

    def _note_used(self) -> None:
        """At once, at the end: a run of cached answers writes nothing else."""
        if self._used:
            with self._transaction():
                now = time.time()
                self._db.executemany(
                    "UPDATE replies SET used_at = ? WHERE hash = ?", ((now, each) for each in self._used)
                )

    def _trim(self, excess: int) -> None:
        query = "SELECT rowid, num_bytes FROM replies WHERE used_at < ? ORDER BY used_at"
        oldest = iter(self._db.execute(query, (self._opened_at,)).fetchall() if excess > 0 else ())
        gone = []
        while excess > 0 and (found := next(oldest, None)) is not None:
            gone.append(found[:1])
            excess -= found[1]
        if gone:
            with self._transaction():
                self._db.executemany("DELETE FROM replies WHERE rowid = ?", gone)
            self._give_back_pages()

    def _give_back_pages(self) -> None:
        """To the disk; an older file has to be made again for that."""
        (is_incremental,) = self._db.execute("PRAGMA auto_vacuum").fetchone()
        # A script runs to its end, where `execute` takes one step, which frees one page.
        self._db.executescript("PRAGMA incremental_vacuum" if is_incremental else "VACUUM")

    def _wait_for_others(self) -> None:
        """Until nobody is removing anything."""
        end = time.monotonic() + BUSY_S
        while not self._locks.take(_OPEN, shared=True):
            if time.monotonic() > end:
                raise self._unusable(TimeoutError("another program is clearing it"))
            time.sleep(0.05)

    def _renew(self) -> None:
        with self._transaction():
            if "used_at" not in {row[1] for row in self._db.execute("PRAGMA table_info(replies)")}:
                for statement in _OLDER:
                    self._db.execute(statement)
        self._db.execute("CREATE INDEX IF NOT EXISTS replies_by_use ON replies (used_at, num_bytes, teacher)")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _errors(self, kind: type[Exception] = sqlite3.Error) -> Iterator[None]:
        try:
            yield
        except kind as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            f"the cache of teachers' answers cannot be used: {self.path}: {error}; free space or repair it, or give "
            "another folder (--teacher-cache)",
            param="teacher_cache",
        )
