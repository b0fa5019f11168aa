"""The SQLite database of files, batches and answers: its tables, its transactions, and pages of a list.

Knows no rule of what may be in them. In WAL mode a transaction outlives the process; a loss of power may take the last
ones. Every query that a request or a row makes finds its rows by an index, as tables grow with all owners' work. SQLite
goes on with a file that was removed or moved, where nobody would find it again; here that is an error.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .room import DirAwayError

_SCHEMA = """
PRAGMA auto_vacuum = INCREMENTAL;
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
CREATE TABLE IF NOT EXISTS files (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, purpose TEXT NOT NULL,
    expires_at INTEGER NOT NULL, num_bytes INTEGER NOT NULL, file BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, is_open INTEGER NOT NULL,
    input_id TEXT NOT NULL, keep_output_s INTEGER NOT NULL, forgotten_at INTEGER NOT NULL, batch BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS answers (
    batch INTEGER NOT NULL, line INTEGER NOT NULL, is_failure INTEGER NOT NULL, answer BLOB NOT NULL,
    PRIMARY KEY (batch, line)
);
CREATE INDEX IF NOT EXISTS files_of ON files (owner, number);
CREATE INDEX IF NOT EXISTS files_by_expiry ON files (expires_at);
CREATE INDEX IF NOT EXISTS batches_of ON batches (owner, number);
CREATE INDEX IF NOT EXISTS batches_by_input ON batches (input_id, is_open);
CREATE INDEX IF NOT EXISTS open_batches_of ON batches (owner) WHERE is_open;
CREATE INDEX IF NOT EXISTS ended_batches ON batches (forgotten_at) WHERE NOT is_open;
CREATE INDEX IF NOT EXISTS ended_batches_of ON batches (owner, forgotten_at) WHERE NOT is_open;
"""


class Database:
    """At `path`, made if it is not there. Raises `sqlite3.Error`, and `DirAwayError` while its file is not there any
    more or is another one. For one thread at a time, but for `reader` and `is_replaced`."""

    def __init__(self, path: Path):
        self._path = path
        self.connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            self.connection.executescript(_SCHEMA)
            self._file = os.stat(path)
        except (sqlite3.Error, OSError):
            self.connection.close()
            raise

    def close(self) -> None:
        self.connection.close()

    @property
    def is_replaced(self) -> bool:
        """Whether another file is in its place."""
        found = self._found()
        return found is not None and not os.path.samestat(found, self._file)

    def _found(self) -> os.stat_result | None:
        with suppress(OSError):
            return os.stat(self._path)
        return None

    def _check_in_place(self) -> None:
        found = self._found()
        if found is None or not os.path.samestat(found, self._file):
            raise DirAwayError(
                "the folder of --batch-dir was removed, moved or replaced while the server used it; put it back, or "
                "restart the server to begin with another"
            )

    def execute(self, query: str, values: tuple[str | int | bytes, ...] = ()) -> sqlite3.Cursor:
        self._check_in_place()
        return self.connection.execute(query, values)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is changed within, or nothing."""
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.execute("COMMIT")
        except BaseException:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            raise

    def reader(self) -> sqlite3.Connection:
        """Of what was committed, for another thread."""
        self._check_in_place()
        return sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True)

    def page(
        self, query: str, values: list[str | int], table: str, owner: str, after: str | None, limit: int,
        is_newest_first: bool,
    ) -> list[bytes] | None:  # fmt: skip
        """What `query` finds in a table behind the row with the id `after`; None where its owner has no such row."""
        if after is not None:
            found = self.execute(f"SELECT number FROM {table} WHERE owner = ? AND id = ?", (owner, after)).fetchone()
            if found is None:
                return None
            query, values = f"{query} AND number {'<' if is_newest_first else '>'} ?", [*values, found[0]]
        query = f"{query} ORDER BY number {'DESC' if is_newest_first else 'ASC'} LIMIT ?"
        return [blob for (blob,) in self.execute(query, (*values, limit))]
