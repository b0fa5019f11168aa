"""The tables of a board's file, and how files of older versions become files of this one.

Answers and scores are kept: versions differ in how they are found. So are verdicts of judges that can still be named.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from ..errors import UserError

SCHEMA_VERSION = 3
# Whose answers those under a hash are, and which judge a name means.
_OWNERS = """
CREATE TABLE IF NOT EXISTS owners (
    config_hash TEXT NOT NULL, model INTEGER NOT NULL, PRIMARY KEY (config_hash, model)
) WITHOUT ROWID
"""
_JUDGES = "CREATE TABLE judges (name TEXT NOT NULL UNIQUE, identity TEXT NOT NULL UNIQUE)"
# Each verdict asks whether its answers are still there, while nobody else may write.
_INDEXES = (
    "CREATE INDEX IF NOT EXISTS answers_to ON answers (prompt_hash)",
    "CREATE INDEX IF NOT EXISTS rows_that_ask ON task_rows (prompt_hash)",
)
_TABLES = (
    """
CREATE TABLE tasks (
    number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, data_hash TEXT NOT NULL, task BLOB NOT NULL
)
""",
    """
CREATE TABLE task_rows (
    task INTEGER NOT NULL, idx INTEGER NOT NULL, prompt_hash TEXT NOT NULL, prompt TEXT NOT NULL, gold TEXT NOT NULL,
    PRIMARY KEY (task, idx)
)
""",
    "CREATE TABLE models (number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, model BLOB NOT NULL)",
    """
CREATE TABLE answers (
    config_hash TEXT NOT NULL, prompt_hash TEXT NOT NULL, text TEXT NOT NULL, finish_reason TEXT NOT NULL,
    num_tokens INTEGER NOT NULL, num_verifications INTEGER NOT NULL, num_verified INTEGER NOT NULL,
    seconds REAL NOT NULL, hardware TEXT NOT NULL, PRIMARY KEY (config_hash, prompt_hash)
) WITHOUT ROWID
""",
    """
CREATE TABLE cells (
    task INTEGER NOT NULL, model INTEGER NOT NULL, data_hash TEXT NOT NULL, config_hash TEXT NOT NULL,
    made_at REAL NOT NULL, cell BLOB NOT NULL, PRIMARY KEY (task, model)
)
""",
    """
CREATE TABLE judgments (
    judge TEXT NOT NULL, asked_hash TEXT NOT NULL, verdict TEXT NOT NULL, PRIMARY KEY (judge, asked_hash)
) WITHOUT ROWID
""",
    _OWNERS,
    _JUDGES,
    *_INDEXES,
)
# Version 1 had verdicts under the judge's name, and had no table of owners at first, which cells tell as well. An
# endpoint's name (MODEL@URL) is its identity still; of a judge that runs here nobody knows what it was when it said so.
_OF_ENDPOINTS = "judge GLOB '*@http://*' OR judge GLOB '*@https://*'"
_AS_JUDGES = f"SELECT DISTINCT judge AS name, judge AS identity FROM judgments WHERE {_OF_ENDPOINTS}"
_FROM_1 = (
    _OWNERS,
    _JUDGES,
    f"INSERT INTO judges {_AS_JUDGES}",
    f"DELETE FROM judgments WHERE NOT ({_OF_ENDPOINTS})",
    *_INDEXES,
)
# By the version of the file; 2 had no indexes.
_STEPS = {1: _FROM_1, 2: _INDEXES}


def bring_up(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables in an empty file, or make those of this version of older ones; within a transaction.

    Raises `UserError` for a file of something else, or of a newer version.
    """
    version = _version(db)
    (num_tables,) = db.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()
    if version == 0 and num_tables == 0:
        steps: tuple[str, ...] = _TABLES
    else:
        _check(version, path)
        steps = _STEPS.get(version, ())
    if steps:
        for statement in (*steps, f"PRAGMA user_version = {SCHEMA_VERSION}"):
            db.execute(statement)


def look_as_now(db: sqlite3.Connection, path: Path) -> None:
    """Have `db`, which may not write, show an older file as one of this version. Raises as `bring_up`."""
    version = _version(db)
    _check(version, path)
    if version == 1:
        db.execute(f"CREATE TEMP VIEW judges AS {_AS_JUDGES}")


def _version(db: sqlite3.Connection) -> int:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return int(version)


def _check(version: int, path: Path) -> None:
    if not 1 <= version <= SCHEMA_VERSION:
        what = "is of a newer specserve" if version > SCHEMA_VERSION else "is no leaderboard of ours"
        raise UserError(
            f"{path} {what} (version {version}, this one reads up to {SCHEMA_VERSION}); give another --board",
            param="board",
        )
