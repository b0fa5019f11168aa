"""Replies in SQLite by the hash of what was asked: whatever ends a program, what was paid for is here.

Every reply is committed as it comes, so that `kill -9` loses what was in flight alone. Several programs may share the
file. Terms that the user has agreed to are remembered here, too.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ..errors import UserError

Kept = TypeVar("Kept")
FILE = "answers.sqlite3"
BUSY_S = 30.0


class AnswerCache:
    """Of the file in `directory`, which is made. Raises `UserError` where it cannot be used."""

    def __init__(self, directory: Path):
        self.path = directory / FILE
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # answers tell of what was asked
            self._db = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
            # With a log, a commit survives the program's death without waiting for the disk.
            for statement in ("journal_mode = WAL", "synchronous = NORMAL"):
                self._db.execute(f"PRAGMA {statement}")
            self._db.execute("CREATE TABLE IF NOT EXISTS replies (hash TEXT PRIMARY KEY, teacher TEXT, reply BLOB)")
            self._db.execute("CREATE TABLE IF NOT EXISTS terms (teacher TEXT PRIMARY KEY, agreed_at REAL)")
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from None

    def get(self, digest: str, kind: type[Kept]) -> Kept | None:
        """None for what is not there, and for an entry that cannot be read any more, which will be replaced."""
        try:
            row = self._db.execute("SELECT reply FROM replies WHERE hash = ?", (digest,)).fetchone()
        except sqlite3.Error as error:
            raise self._unusable(error) from None
        if row is None:
            return None
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(row[0], type=kind)
        return None

    def put(self, digest: str, teacher: str, reply: Any) -> None:
        try:
            self._db.execute(
                "INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", (digest, teacher, msgspec.json.encode(reply))
            )
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def has_terms(self, teacher: str) -> bool:
        try:
            return self._db.execute("SELECT 1 FROM terms WHERE teacher = ?", (teacher,)).fetchone() is not None
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def agree(self, teacher: str) -> None:
        try:
            self._db.execute("INSERT OR REPLACE INTO terms VALUES (?, ?)", (teacher, time.time()))
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def close(self) -> None:
        self._db.close()

    def _unusable(self, error: Exception) -> UserError:
        return UserError(
            f"the cache of teachers' answers cannot be used: {self.path}: {error}; free space or repair it, or give "
            "another folder (--teacher-cache)",
            param="teacher_cache",
        )
