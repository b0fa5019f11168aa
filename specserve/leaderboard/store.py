"""A leaderboard in one SQLite file: tasks, models, answers row by row, scores, judgments.

Owns tables and transactions; what a score is, others say. Answers are kept under hashes of all that they depend on
(`config_hash`, `prompt_hash`), so what has not changed is never made again, and what has is missing by itself. Every
answer is committed as it comes. Several processes may use the file; who works on a model is the kernel's to know, by
ranges of a lock file, which end with their process.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from ..errors import UserError

SCHEMA_VERSION = 1
_BUSY_S = 30.0
_SCHEMA = """
CREATE TABLE tasks (
    number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, data_hash TEXT NOT NULL, task BLOB NOT NULL
);
CREATE TABLE task_rows (
    task INTEGER NOT NULL, idx INTEGER NOT NULL, prompt_hash TEXT NOT NULL, prompt TEXT NOT NULL, gold TEXT NOT NULL,
    PRIMARY KEY (task, idx)
);
CREATE TABLE models (number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, model BLOB NOT NULL);
CREATE TABLE answers (
    config_hash TEXT NOT NULL, prompt_hash TEXT NOT NULL, text TEXT NOT NULL, finish_reason TEXT NOT NULL,
    num_tokens INTEGER NOT NULL, num_verifications INTEGER NOT NULL, num_verified INTEGER NOT NULL,
    seconds REAL NOT NULL, hardware TEXT NOT NULL, PRIMARY KEY (config_hash, prompt_hash)
) WITHOUT ROWID;
CREATE TABLE cells (
    task INTEGER NOT NULL, model INTEGER NOT NULL, data_hash TEXT NOT NULL, config_hash TEXT NOT NULL,
    made_at REAL NOT NULL, cell BLOB NOT NULL, PRIMARY KEY (task, model)
);
CREATE TABLE judgments (
    judge TEXT NOT NULL, asked_hash TEXT NOT NULL, verdict TEXT NOT NULL, PRIMARY KEY (judge, asked_hash)
) WITHOUT ROWID;
"""

Kind = Literal["generate", "embed", "rerank", "classify"]


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """Rows and how answers to them are judged. `floor` is a score that is worth nothing."""

    kind: Kind
    data: str
    metric: str
    rows: int | None = None  # the first so many; None: all
    max_tokens: int = 512
    system: str | None = None
    floor: float = 0.0


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A base model and a LoRA of it, or none; the hashes are of what was run last."""

    base: str
    adapter: str | None = None
    adapter_kind: Kind = "generate"


class TaskRow(msgspec.Struct, frozen=True):
    prompt_hash: str
    prompt: str  # as people read it
    gold: str


class KeptAnswer(msgspec.Struct, frozen=True):
    """`num_verified` are the tokens that verifications gave, the prompt's first token left out."""

    text: str
    finish_reason: str
    num_tokens: int
    num_verifications: int
    num_verified: int
    seconds: float  # of the engine, since the answer before
    hardware: str


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """What one model is worth at one task; `row_scores` are of its rows in order, where they have any."""

    score: float
    row_scores: tuple[float, ...] = ()
    metrics: dict[str, float]
    num_rows: int
    tokens_per_s: float | None = None
    tokens_per_verification: float | None = None
    hardware: str


class StoredTask(msgspec.Struct, frozen=True):
    number: int
    name: str
    data_hash: str
    task: Task


class StoredModel(msgspec.Struct, frozen=True):
    number: int
    name: str
    model: Model


class StoredCell(msgspec.Struct, frozen=True):
    """`is_current` is False where the task's rows have changed since."""

    cell: Cell
    config_hash: str
    is_current: bool
    made_at: float


Kept = TypeVar("Kept", Task, Model, Cell)


class LeaderboardStore:
    """Of the file at `path`, made if `create`. Raises `UserError` where it cannot be used. For one thread."""

    def __init__(self, path: Path, *, create: bool = False):
        self.path = path
        if not path.is_file() and not create:
            raise UserError(
                f"there is no leaderboard {path}; begin one with `specserve leaderboard add TASK --data FILE`, or name "
                "it with --board",
                param="board",
            )
        try:
            self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
            self._prepare()
        except sqlite3.Error as error:
            raise UserError(f"the leaderboard {path} cannot be used: {error}", param="board") from None

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        with self.transaction():
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            (num_tables,) = self._db.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()
            if version == 0 and num_tables == 0:
                for statement in _SCHEMA.split(";\n"):
                    if statement.strip():
                        self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                what = "is of a newer specserve" if version > SCHEMA_VERSION else "is no leaderboard of ours"
                raise UserError(
                    f"{self.path} {what} (version {version}, this one reads {SCHEMA_VERSION}); give another --board",
                    param="board",
                )

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is changed within, or nothing; others wait."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read within is of one moment, whatever others write meanwhile."""
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("ROLLBACK")

    # -- tasks and models

    def put_task(self, name: str, task: Task, data_hash: str, rows: Iterable[TaskRow]) -> None:
        """Add it, or replace the one of that name."""
        with self.transaction():
            blob = msgspec.json.encode(task)
            self._db.execute(
                "INSERT INTO tasks (name, data_hash, task) VALUES (?, ?, ?) "
                "ON CONFLICT (name) DO UPDATE SET data_hash = excluded.data_hash, task = excluded.task",
                (name, data_hash, blob),
            )
            (number,) = self._db.execute("SELECT number FROM tasks WHERE name = ?", (name,)).fetchone()
            self._db.execute("DELETE FROM task_rows WHERE task = ?", (number,))
            self._db.executemany(
                "INSERT INTO task_rows VALUES (?, ?, ?, ?, ?)",
                ((number, idx, row.prompt_hash, row.prompt, row.gold) for idx, row in enumerate(rows)),
            )

    def tasks(self) -> list[StoredTask]:
        found = self._db.execute("SELECT number, name, data_hash, task FROM tasks ORDER BY number")
        return [StoredTask(number, name, data, _decode(blob, Task)) for number, name, data, blob in found]

    def rows(self, task: StoredTask) -> list[TaskRow]:
        query = "SELECT prompt_hash, prompt, gold FROM task_rows WHERE task = ? ORDER BY idx"
        return [TaskRow(*row) for row in self._db.execute(query, (task.number,))]

    def put_model(self, name: str, model: Model) -> None:
        self._db.execute(
            "INSERT INTO models (name, model) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET model = excluded.model",
            (name, msgspec.json.encode(model)),
        )

    def models(self) -> list[StoredModel]:
        found = self._db.execute("SELECT number, name, model FROM models ORDER BY number")
        return [StoredModel(number, name, _decode(blob, Model)) for number, name, blob in found]

    def remove(self, name: str) -> bool:
        """The task or the model of that name, with its scores; answers stay, should it come back."""
        with self.transaction():
            for table, column in (("tasks", "task"), ("models", "model")):
                found = self._db.execute(f"SELECT number FROM {table} WHERE name = ?", (name,)).fetchone()
                if found is not None:
                    self._db.execute(f"DELETE FROM cells WHERE {column} = ?", found)
                    self._db.execute(f"DELETE FROM {table} WHERE number = ?", found)
                    if table == "tasks":
                        self._db.execute("DELETE FROM task_rows WHERE task = ?", found)
                    return True
        return False

    # -- answers and scores

    def answers(self, config_hash: str) -> dict[str, KeptAnswer]:
        """By the hashes of their prompts."""
        columns = "prompt_hash, text, finish_reason, num_tokens, num_verifications, num_verified, seconds, hardware"
        found = self._db.execute(f"SELECT {columns} FROM answers WHERE config_hash = ?", (config_hash,))
        return {prompt_hash: KeptAnswer(*values) for prompt_hash, *values in found}

    def put_answer(self, config_hash: str, prompt_hash: str, answer: KeptAnswer) -> None:
        values = (config_hash, prompt_hash, *msgspec.structs.astuple(answer))
        self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def put_cell(self, task: StoredTask, model_number: int, config_hash: str, cell: Cell) -> None:
        values = (task.number, model_number, task.data_hash, config_hash, time.time(), msgspec.json.encode(cell))
        self._db.execute("INSERT OR REPLACE INTO cells VALUES (?, ?, ?, ?, ?, ?)", values)

    def cells(self) -> dict[tuple[str, str], StoredCell]:
        """By the names of task and model."""
        query = (
            "SELECT tasks.name, models.name, cell, config_hash, cells.data_hash = tasks.data_hash, made_at FROM cells "
            "JOIN tasks ON tasks.number = cells.task JOIN models ON models.number = cells.model"
        )
        return {
            (task, model): StoredCell(_decode(blob, Cell), config_hash, bool(is_current), made_at)
            for task, model, blob, config_hash, is_current, made_at in self._db.execute(query)
        }

    # -- judgments

    def judgments(self, judge: str) -> dict[str, str]:
        """Verdicts by the hashes of what was asked."""
        return dict(self._db.execute("SELECT asked_hash, verdict FROM judgments WHERE judge = ?", (judge,)))

    def put_judgment(self, judge: str, asked_hash: str, verdict: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO judgments VALUES (?, ?, ?)", (judge, asked_hash, verdict))

    def judges(self) -> list[str]:
        return [judge for (judge,) in self._db.execute("SELECT DISTINCT judge FROM judgments ORDER BY judge")]


class ModelLocks:
    """Which models this process works on; another process's end at once with it, however it ends."""

    def __init__(self, board: Path):
        self._file = os.open(board.with_name(board.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def take(self, number: int) -> bool:
        """False where another process has the model."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Gives all of them back."""
        with suppress(OSError):
            os.close(self._file)


def _decode(blob: bytes, kind: type[Kept]) -> Kept:
    return msgspec.json.decode(blob, type=kind)
