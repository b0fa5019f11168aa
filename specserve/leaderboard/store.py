"""A leaderboard in one SQLite file: tasks, models, answers row by row, scores, judgments.

Owns tables and transactions; what a score is, others say. Answers are kept under hashes of all that they depend on
(`config_hash`, `prompt_hash`), so what has not changed is never made again, and what has is missing by itself. Every
answer is committed as it comes. Several processes may use the file.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from ..errors import UserError
from ..teachers.range_locks import RangeLocks
from .entries import (
    WHATS,
    Cell,
    KeptAnswer,
    Model,
    StoredCell,
    StoredModel,
    StoredTask,
    Task,
    TaskRow,
    What,
)
from .tables import bring_up, look_as_now

_BUSY_S = 30.0

Kept = TypeVar("Kept", Task, Model, Cell)


@contextmanager
def open_board(path: Path, *, create: bool = False, read_only: bool = False) -> Iterator[LeaderboardStore]:
    """The store while it is used. What SQLite cannot do within, as on a full disk, is a `UserError` too."""
    store = LeaderboardStore(path, create=create, read_only=read_only)
    try:
        yield store
    except sqlite3.Error as error:
        raise _unusable(path, error) from error
    finally:
        store.close()


class LeaderboardStore:
    """Of the file at `path`, made if `create`. Raises `UserError` where it cannot be used. For one thread."""

    def __init__(self, path: Path, *, create: bool = False, read_only: bool = False):
        """With `read_only` nothing is changed, and the file may lie where nothing can be written."""
        self.path = path
        if not path.is_file() and not create:
            raise UserError(
                f"there is no leaderboard {path}; begin one with `specserve leaderboard add TASK --data FILE`, or name "
                "it with --board",
                param="board",
            )
        try:
            if read_only:
                self._db = _opened_to_read(path)
                look_as_now(self._db, path)
            else:
                self._db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
                self._prepare()
        except sqlite3.Error as error:
            raise _unusable(path, error) from None

    def _prepare(self) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        with self.transaction():
            bring_up(self._db, self.path)

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

    def named(self, name: str) -> list[What]:
        """Which of task and model there is of that name."""
        found = [
            (what, self._db.execute(f"SELECT 1 FROM {what}s WHERE name = ?", (name,)).fetchone()) for what in WHATS
        ]
        return [what for what, row in found if row is not None]

    def remove(self, what: What, name: str) -> int:
        """With its scores, and the answers that no other task or model has; returns how many answers went. Within a
        transaction."""
        (number,) = self._db.execute(f"SELECT number FROM {what}s WHERE name = ?", (name,)).fetchone()
        if what == "task":
            own = "prompt_hash IN (SELECT prompt_hash FROM task_rows WHERE task = :number)"
            others = "prompt_hash IN (SELECT prompt_hash FROM task_rows WHERE task != :number)"
        else:
            under = (
                "config_hash IN (SELECT config_hash FROM owners WHERE model {0} :number "
                "UNION SELECT config_hash FROM cells WHERE model {0} :number)"
            )
            own, others = under.format("="), under.format("!=")
        num = self._db.execute(f"DELETE FROM answers WHERE {own} AND NOT {others}", {"number": number}).rowcount
        for table in ("cells", "task_rows") if what == "task" else ("cells", "owners"):
            self._db.execute(f"DELETE FROM {table} WHERE {what} = ?", (number,))
        self._db.execute(f"DELETE FROM {what}s WHERE number = ?", (number,))
        return num

    def give_room_back(self) -> None:
        """Of what was removed."""
        with suppress(sqlite3.OperationalError):  # another process writes: then a later removal does
            self._db.execute("VACUUM")

    # -- answers and scores

    def answers(self, config_hash: str) -> dict[str, KeptAnswer]:
        """By the hashes of their prompts."""
        columns = "prompt_hash, text, finish_reason, num_tokens, num_verifications, num_verified, seconds, hardware"
        found = self._db.execute(f"SELECT {columns} FROM answers WHERE config_hash = ?", (config_hash,))
        return {prompt_hash: KeptAnswer(*values) for prompt_hash, *values in found}

    def put_answer(self, config_hash: str, prompt_hash: str, answer: KeptAnswer) -> None:
        values = (config_hash, prompt_hash, *msgspec.structs.astuple(answer))
        self._db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)

    def texts(self) -> dict[TaskRow, set[str]]:
        """All answers to each row, of whatever model and time."""
        query = "SELECT DISTINCT prompt_hash, prompt, gold, text FROM task_rows JOIN answers USING (prompt_hash)"
        found: dict[TaskRow, set[str]] = {}
        for *row, text in self._db.execute(query):
            found.setdefault(TaskRow(*row), set()).add(text)
        return found

    def has_texts(self, row: TaskRow, texts: tuple[str, str]) -> bool:
        """Whether two different texts are still answers to `row`, and that a row of a task."""
        (num,) = self._db.execute(
            "SELECT COUNT(DISTINCT text) FROM task_rows JOIN answers USING (prompt_hash) "
            "WHERE (prompt_hash, prompt, gold) = (?, ?, ?) AND text IN (?, ?)",
            (row.prompt_hash, row.prompt, row.gold, *texts),
        ).fetchone()
        return bool(num == 2)

    def put_owner(self, config_hash: str, model_number: int) -> None:
        """Before answers come: whose they are."""
        self._db.execute("INSERT OR IGNORE INTO owners VALUES (?, ?)", (config_hash, model_number))

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

    def judges(self) -> dict[str, str]:
        """Who those names mean, in order: a judge's identity is another one when it was trained again."""
        return dict(self._db.execute("SELECT name, identity FROM judges ORDER BY name"))

    def put_judge(self, name: str, identity: str) -> None:
        """From now on `name` means that one, and no other name does; what another one said under it stays kept."""
        self._db.execute("INSERT OR REPLACE INTO judges VALUES (?, ?)", (name, identity))

    def judgments(self, identity: str) -> dict[str, str]:
        """Verdicts of one judge by the hashes of what was asked."""
        return dict(self._db.execute("SELECT asked_hash, verdict FROM judgments WHERE judge = ?", (identity,)))

    def put_judgment(self, identity: str, asked_hash: str, verdict: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO judgments VALUES (?, ?, ?)", (identity, asked_hash, verdict))

    def drop_judgments(self, asked_hashes: Iterable[str]) -> None:
        """Of all judges."""
        gone = msgspec.json.encode(list(asked_hashes)).decode()
        self._db.execute("DELETE FROM judgments WHERE asked_hash IN (SELECT value FROM json_each(?))", (gone,))


def model_locks(board: Path) -> RangeLocks:
    """Which models, by their numbers, processes work on; another process's locks end with it. Raises `OSError`."""
    return RangeLocks(board.with_name(board.name + ".lock"))


def _unusable(path: Path, error: sqlite3.Error) -> UserError:
    return UserError(f"the leaderboard {path} cannot be used: {error}", param="board")


def _opened_to_read(path: Path) -> sqlite3.Connection:
    """Where the log cannot be made beside the file, as on a disk that is mounted read-only, as a file at rest."""
    db = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
    try:
        db.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()
        return db
    except sqlite3.OperationalError as error:
        db.close()
        log = path.with_name(path.name + "-wal")
        cannot_write = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
        if not cannot_write or (log.exists() and log.stat().st_size):
            raise
        return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", isolation_level=None, uri=True)


def _decode(blob: bytes, kind: type[Kept]) -> Kept:
    return msgspec.json.decode(blob, type=kind)
