"""Files of owners: rows of one table, whose content lies in the folder. On the store's thread.

What is inserted is in its place on the disk already, and is `kept` once the database knows of it.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ...errors import UserError
from .database import Database
from .disk import BatchDir, Incoming, disk_errors
from .retention import Retention
from .room import QuotaError
from .types import FileObject, Purpose

MAX_OUTPUTS = 2  # files that a batch leaves


class Files:
    """Of one store; `now` in seconds since 1970."""

    def __init__(self, db: Database, folder: BatchDir, retention: Retention, now: Callable[[], int]):
        self._db, self._folder, self._retention, self._now = db, folder, retention, now

    def add(self, owner: str, content: Incoming, filename: str, keep_s: int) -> FileObject:
        """Of content in its place, which is kept from then on. Raises `QuotaError` where the owner has too many."""
        self.check_num(owner, 1)
        with disk_errors():
            file = self.insert(owner, content, filename, "batch", keep_s)
        self.kept(owner, content)
        self._retention.make_room(self._now())
        return file

    def check_num(self, owner: str, num_more: int) -> None:
        """Raises `QuotaError` where the owner would have too many with so many more."""
        (num,) = self._db.execute("SELECT COUNT(*) FROM files WHERE owner = ?", (owner,)).fetchone()
        num_open, most = self.num_open_batches(owner), self._retention.limits.max_own_files
        if num + MAX_OUTPUTS * num_open + num_more > most:
            raise QuotaError(
                f"this key has {num} files and {num_open} batches that will leave up to {MAX_OUTPUTS} each, and may "
                f"have {most} files (--batch-key-files); DELETE /v1/files/ID makes room, as does the expiry of files"
            )

    def num_open_batches(self, owner: str) -> int:
        """Those that have not ended."""
        (num,) = self._db.execute("SELECT COUNT(*) FROM batches WHERE owner = ? AND is_open", (owner,)).fetchone()
        return int(num)

    def insert(self, owner: str, content: Incoming, filename: str, purpose: Purpose, keep_s: int) -> FileObject:
        now = self._now()
        file = FileObject(
            id=content.id,
            bytes=content.num_bytes,
            created_at=now,
            expires_at=now + keep_s,
            filename=filename,
            purpose=purpose,
        )
        self._db.execute(
            "INSERT INTO files (id, owner, purpose, expires_at, num_bytes, file) VALUES (?, ?, ?, ?, ?, ?)",
            (content.id, owner, purpose, file.expires_at, content.num_bytes, msgspec.json.encode(file)),
        )
        return file

    def kept(self, owner: str, content: Incoming) -> None:
        """What was inserted is in the database; its owner pays for it, who was not charged yet."""
        content.kept()
        if content.owner is None:
            self._folder.room.charge(owner, content.num_bytes)

    def get(self, owner: str, file_id: str) -> FileObject | None:
        query = "SELECT file FROM files WHERE owner = ? AND id = ? AND expires_at > ?"
        found = self._db.execute(query, (owner, file_id, self._now())).fetchone()
        return None if found is None else msgspec.json.decode(found[0], type=FileObject)

    def page(
        self, owner: str, after: str | None, limit: int, is_newest_first: bool, purpose: str | None
    ) -> list[FileObject] | None:
        """At most `limit`; None where `after` is no file."""
        query = "SELECT file FROM files WHERE owner = ? AND expires_at > ?"
        values: list[str | int] = [owner, self._now()]
        if purpose is not None:
            query, values = f"{query} AND purpose = ?", [*values, purpose]
        found = self._db.page(query, values, "files", owner, after, limit, is_newest_first)
        return None if found is None else [msgspec.json.decode(blob, type=FileObject) for blob in found]

    def delete(self, owner: str, file_id: str) -> bool:
        """Says whether it was there. Raises `UserError` while a batch reads it."""
        found = self.get(owner, file_id)
        if found is None:
            return False
        query = "SELECT id FROM batches WHERE input_id = ? AND is_open"
        if (reader := self._db.execute(query, (file_id,)).fetchone()) is not None:
            raise UserError(
                f"file {file_id!r} is read by {reader[0]}; cancel that first, or wait for its end",
                param="file_id",
                status=409,
                code="file_in_use",
            )
        self._retention.forget_file(file_id, owner, found.bytes)
        return True
