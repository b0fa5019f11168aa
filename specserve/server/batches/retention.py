"""What leaves the store by itself: files whose time is over, batches that ended long ago, and the oldest of too many.

No file that a batch reads leaves. A file leaves the database first and then the disk, so that none is promised that is
not there; what an end of the process leaves between the two goes at the next start. On the store's thread.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import msgspec

from .database import Database
from .disk import BatchDir, disk_errors
from .room import StorageError
from .types import Batch

KEEP_S = 30 * 86400  # files, unless they say otherwise, and batches after their end
LEAST_KEPT_S = 600  # batches after their end, however much is kept: their owner reads the answers then

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeepLimits:
    """`max_own_files`: of an owner, and how many batches that have ended are known of one; `max_kept_bytes`: of all
    that is kept, above which batches that ended `LEAST_KEPT_S` ago go, None: none goes for that."""

    max_own_files: int = 10_000
    max_kept_bytes: int | None = None


class Retention:
    """Of one store."""

    def __init__(self, db: Database, folder: BatchDir, limits: KeepLimits):
        self._db, self._folder, self.limits = db, folder, limits

    def forget_file(self, file_id: str, owner: str, num_bytes: int) -> None:
        """Raises `StorageError`."""
        with disk_errors():
            self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))
            self._folder.delete(file_id)
        self._folder.room.count(-num_bytes, owner)

    def forget_old(self, now: int) -> None:
        """Delete files whose time is over and that no batch reads, and batches that ended long ago. Raises
        `StorageError`."""
        query = (
            "SELECT id, owner, num_bytes FROM files WHERE expires_at <= ? "
            "AND NOT EXISTS (SELECT 1 FROM batches WHERE input_id = files.id AND is_open)"
        )
        for file_id, owner, num_bytes in self._db.execute(query, (now,)).fetchall():
            self.forget_file(file_id, owner, num_bytes)
        with disk_errors():
            self._db.execute("DELETE FROM batches WHERE NOT is_open AND forgotten_at <= ?", (now,))

    def after_end_of(self, owner: str) -> None:
        """Forget the oldest of an owner's batches that have ended, beyond as many as may be known; their files stay."""
        query = (
            "DELETE FROM batches WHERE number IN (SELECT number FROM batches WHERE owner = ? AND NOT is_open "
            "ORDER BY forgotten_at DESC, number DESC LIMIT -1 OFFSET ?)"
        )
        with disk_errors():
            self._db.execute(query, (owner, self.limits.max_own_files))

    def make_room(self, now: int) -> None:
        """Where more is kept than may be, batches go with their files, those first that ended first."""
        limit = self.limits.max_kept_bytes
        query = (
            "SELECT number, owner, batch FROM batches WHERE NOT is_open AND forgotten_at <= ? "
            "ORDER BY forgotten_at, number LIMIT 1"
        )
        try:
            while limit is not None and self._folder.room.num_bytes > limit:
                if (oldest := self._db.execute(query, (now + KEEP_S - LEAST_KEPT_S,)).fetchone()) is None:
                    return
                number, owner, blob = oldest
                self._forget_batch(number, owner, msgspec.json.decode(blob, type=Batch))
        except StorageError as error:  # of the database's own writing; the next one tries again
            logger.error("batches that have ended stay for now: %s", error)

    def _forget_batch(self, number: int, owner: str, batch: Batch) -> None:
        for file_id in (batch.output_file_id, batch.error_file_id, batch.input_file_id):
            found = self._db.execute("SELECT num_bytes FROM files WHERE id = ?", (file_id or "",)).fetchone()
            query = "SELECT 1 FROM batches WHERE input_id = ? AND number != ? LIMIT 1"
            if found is not None and self._db.execute(query, (file_id or "", number)).fetchone() is None:
                self.forget_file(file_id or "", owner, found[0])
        with disk_errors():
            self._db.execute("DELETE FROM batches WHERE number = ?", (number,))
        logger.info("%s of %r made room for newer ones, with its files", batch.id, owner)
