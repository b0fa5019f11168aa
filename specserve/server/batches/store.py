"""Batches and the answers of rows, in SQLite, and the files of both (`files`): what outlives the server.

Everything here belongs to an owner, the name of the key that made it, and does not exist for others. One thread calls
all of it but `write_output`. A row's answer and the batch's counts are one transaction, as are the end of a batch, its
output files and the removal of its answers; so a row is answered once, whenever the process ends. What a
loss of power takes of the last ones runs again.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress

import msgspec

from ...errors import OverloadedError, UserError
from .database import Database
from .disk import BatchDir, Incoming, disk_errors
from .files import MAX_OUTPUTS, Files
from .retention import KEEP_S, KeepLimits, Retention
from .room import StorageError
from .rows import BatchTooLargeError
from .types import Batch, BatchUsage

STATE_FILE = "state.sqlite3"
MAX_OPEN_BATCHES = 100  # of an owner
_KEPT = (
    "SELECT owner, SUM(num_bytes) FROM files GROUP BY owner UNION ALL SELECT owner, SUM(LENGTH(answer)) "
    "FROM answers JOIN batches ON batches.number = answers.batch GROUP BY owner"
)


class OpenBatch(msgspec.Struct, frozen=True):
    """A batch that has not ended, and what its owner does not see of it."""

    number: int
    owner: str
    keep_output_s: int
    batch: Batch


class BatchStore:
    """Of one folder. Raises `UserError` where that cannot be used, and `DirAwayError` while it is not in its place."""

    def __init__(self, folder: BatchDir, clock: Callable[[], float] = time.time, limits: KeepLimits | None = None):
        self.folder, self._clock = folder, clock
        path = folder.path / STATE_FILE
        try:
            self._db = Database(path)
            known = {file_id for (file_id,) in self._db.execute("SELECT id FROM files")}
            folder.tidy(known)
            for owner, num_bytes in self._db.execute(_KEPT):
                folder.room.begin_with(owner, num_bytes)
        except (OSError, sqlite3.Error) as error:
            folder.close()
            fix = ""
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                fix = "; put a backup of the folder in its place, or move it away to begin without files and batches"
            raise UserError(f"the state of --batch-dir, {path}, cannot be read: {error}{fix}") from None
        self._retention = Retention(self._db, folder, limits or KeepLimits())
        self.files = Files(self._db, folder, self._retention, lambda: self.now)
        self._num_answer_bytes: dict[int, int] = {}  # of batches that have not ended

    def close(self) -> None:
        self._db.close()
        self.folder.close()

    @property
    def is_replaced(self) -> bool:
        """Whether another store is in its place, which is to be opened then. On any thread."""
        return self._db.is_replaced

    @property
    def now(self) -> int:
        """Seconds since 1970."""
        return int(self._clock())

    def forget_old(self) -> None:
        """What nobody needs any more goes. Raises `StorageError`."""
        self._retention.forget_old(self.now)
        self._retention.make_room(self.now)

    # -- batches

    def add_batch(self, owner: str, batch: Batch, keep_output_s: int) -> OpenBatch | None:
        """None where its input is not there any more. Raises `UserError` where the owner has too many that are open,
        or too many files for what it will leave."""
        if self.files.get(owner, batch.input_file_id) is None:
            return None
        if (num := self.files.num_open_batches(owner)) >= MAX_OPEN_BATCHES:
            raise OverloadedError(f"{num} batches of this key have not ended, as many as may be; wait for one's end")
        self.files.check_num(owner, MAX_OUTPUTS)
        with disk_errors():
            added = self._db.execute(
                "INSERT INTO batches (id, owner, is_open, input_id, keep_output_s, forgotten_at, batch) "
                "VALUES (?, ?, 1, ?, ?, 0, ?)",
                (batch.id, owner, batch.input_file_id, keep_output_s, msgspec.json.encode(batch)),
            )
        assert added.lastrowid is not None
        return OpenBatch(added.lastrowid, owner, keep_output_s, batch)

    def batch(self, owner: str, batch_id: str) -> Batch | None:
        query = "SELECT batch FROM batches WHERE owner = ? AND id = ?"
        found = self._db.execute(query, (owner, batch_id)).fetchone()
        return None if found is None else msgspec.json.decode(found[0], type=Batch)

    def cancel(self, owner: str, batch_id: str) -> Batch | None:
        """Set it to be cancelled, where that can be; as it is then."""
        query = "SELECT number FROM batches WHERE owner = ? AND id = ?"
        found = self._db.execute(query, (owner, batch_id)).fetchone()

        def change(batch: Batch) -> None:
            if batch.status in ("validating", "in_progress"):
                batch.status, batch.cancelling_at = "cancelling", self.now

        return None if found is None else self.change(found[0], change)

    def batches(self, owner: str, after: str | None, limit: int) -> list[Batch] | None:
        """Newest first, at most `limit`; None where `after` is no batch."""
        query = "SELECT batch FROM batches WHERE owner = ?"
        found = self._db.page(query, [owner], "batches", owner, after, limit, is_newest_first=True)
        return None if found is None else [msgspec.json.decode(blob, type=Batch) for blob in found]

    def open_batches(self) -> list[OpenBatch]:
        """Oldest first."""
        query = "SELECT number, owner, keep_output_s, batch FROM batches WHERE is_open ORDER BY number"
        return [
            OpenBatch(number, owner, keep_s, msgspec.json.decode(blob, type=Batch))
            for number, owner, keep_s, blob in self._db.execute(query)
        ]

    def current(self, number: int) -> Batch:
        (blob,) = self._db.execute("SELECT batch FROM batches WHERE number = ?", (number,)).fetchone()
        return msgspec.json.decode(blob, type=Batch)

    def change(self, number: int, change: Callable[[Batch], None]) -> Batch:
        """Let `change` edit a batch that has not ended."""
        batch = self.current(number)
        change(batch)
        with disk_errors():
            self._db.execute("UPDATE batches SET batch = ? WHERE number = ?", (msgspec.json.encode(batch), number))
        return batch

    # -- answers

    def answered_lines(self, number: int) -> set[int]:
        """On any thread."""
        with closing(self._db.reader()) as db:
            return {line for (line,) in db.execute("SELECT line FROM answers WHERE batch = ?", (number,))}

    def add_answer(self, opened: OpenBatch, line: int, answer: bytes, is_failure: bool, usage: BatchUsage) -> None:
        """A row's line of output. Raises `StorageError` or `BatchTooLargeError`, and then nothing has changed."""

        def count(batch: Batch) -> None:
            batch.request_counts.failed += is_failure
            batch.request_counts.completed += not is_failure
            _add_usage(batch.usage, usage)

        number, owner, room = opened.number, opened.owner, self.folder.room
        num_bytes = self._answer_bytes(number) + len(answer)
        self._check_can_end(opened, num_bytes)
        self._retention.make_room(self.now)
        room.count(len(answer), owner)
        is_new = False
        try:
            with disk_errors(), self._db.transaction():
                row = (number, line, is_failure, answer)
                if changed := self._db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", row).rowcount:
                    self.change(number, count)
            is_new = bool(changed)
            if is_new:
                self._num_answer_bytes[number] = num_bytes
        finally:
            if not is_new:
                room.count(-len(answer), owner)

    def _answer_bytes(self, number: int) -> int:
        """Of a batch that has not ended; counted once, as a row's answer must not take longer the more there are."""
        if number not in self._num_answer_bytes:
            query = "SELECT SUM(LENGTH(answer)) FROM answers WHERE batch = ?"
            self._num_answer_bytes[number] = self._db.execute(query, (number,)).fetchone()[0] or 0
        return self._num_answer_bytes[number]

    def _check_can_end(self, opened: OpenBatch, answer_bytes: int) -> None:
        """Whether a batch with so many bytes of answers fits if nothing else is kept. They are written once more at its
        end, beside the input; its owner pays for them once."""
        query = "SELECT num_bytes FROM files WHERE id = ?"
        found = self._db.execute(query, (opened.batch.input_file_id,)).fetchone()
        input_bytes, room = found[0] if found is not None else 0, self.folder.room
        for needed, limit, flag in (
            (input_bytes + 2 * answer_bytes, room.max_bytes, "--batch-disk-gib"),
            (input_bytes + answer_bytes, room.max_owner_bytes, "--batch-key-gib"),
        ):
            if limit is not None and needed > limit:
                raise BatchTooLargeError(
                    "batch_too_large",
                    f"with {input_bytes} bytes of rows and {answer_bytes} of answers the batch needs {needed} bytes to "
                    f"end, of which {flag} allows {limit}; send the rows without an answer in further batches",
                )

    def write_output(self, number: int, is_failure: bool | None, incoming: Incoming) -> None:
        """The answers of a batch in the order of its lines, on any thread; `is_failure` None: all."""
        which = "" if is_failure is None else "AND is_failure = ?"
        values = [number] if is_failure is None else [number, is_failure]
        with closing(self._db.reader()) as db:
            query = f"SELECT answer FROM answers WHERE batch = ? {which} ORDER BY line"
            for (answer,) in db.execute(query, values):
                incoming.write(answer)

    def end(self, opened: OpenBatch, change: Callable[[Batch], None], outputs: Mapping[str, Incoming]) -> None:
        """The last change of a batch, with files that are in their places, by the names of the batch's fields."""

        def close(batch: Batch) -> None:
            change(batch)
            for name, incoming in outputs.items():
                setattr(batch, name, incoming.id)

        size = self._answer_bytes(opened.number)
        with disk_errors(), self._db.transaction():
            for name, incoming in outputs.items():
                filename = f"{opened.batch.id}_{name.removesuffix('_file_id')}.jsonl"
                self.files.insert(opened.owner, incoming, filename, "batch_output", opened.keep_output_s)
            self.change(opened.number, close)
            self._db.execute(
                "UPDATE batches SET is_open = 0, forgotten_at = ? WHERE number = ?", (self.now + KEEP_S, opened.number)
            )
            self._db.execute("DELETE FROM answers WHERE batch = ?", (opened.number,))
        for incoming in outputs.values():
            self.files.kept(opened.owner, incoming)
        self.folder.room.count(-size, opened.owner)
        self._num_answer_bytes.pop(opened.number, None)
        with suppress(sqlite3.Error, StorageError):  # the batch has ended; a later end does what is left
            self._retention.after_end_of(opened.owner)
            self._retention.make_room(self.now)
            self._db.execute("PRAGMA incremental_vacuum").fetchall()


def _add_usage(total: BatchUsage, more: BatchUsage) -> None:
    total.input_tokens += more.input_tokens
    total.input_tokens_details.cached_tokens += more.input_tokens_details.cached_tokens
    total.output_tokens += more.output_tokens
    total.output_tokens_details.reasoning_tokens += more.output_tokens_details.reasoning_tokens
    total.total_tokens += more.total_tokens
