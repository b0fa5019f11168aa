"""How much of a disk may be used, by all owners together and by each of them, and how much is.

Counts bytes that somebody writes or deletes; never looks at the disk. Any thread may count.
"""

from __future__ import annotations

import threading
from collections import Counter

from ...errors import UserError


class StorageError(UserError):
    """What is kept cannot be reached, or no more can be kept, until something is done about it."""

    status = 503
    type = "server_error"
    code = "storage_unavailable"


class DirAwayError(StorageError):
    """The folder, or what should lie in it, is not in its place."""


class DiskFullError(StorageError):
    """There is no room, of the disk or of what may be used of it."""

    status = 507
    code = "insufficient_storage"


class QuotaError(DiskFullError):
    """An owner has as much as one may have. No 429, which clients try again by themselves."""

    status = 403
    type = "invalid_request_error"
    code = "storage_quota_exceeded"


class Room:
    """At most `max_bytes` for all, and `max_owner_bytes`, if there is such a limit, for one owner."""

    def __init__(self, max_bytes: int, max_owner_bytes: int | None = None):
        self.max_bytes, self.max_owner_bytes = max_bytes, max_owner_bytes
        self._num_bytes = 0
        self._of_owner: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Of all that is kept."""
        return self._num_bytes

    def num_bytes_of(self, owner: str) -> int:
        return self._of_owner[owner]

    def begin_with(self, owner: str, num_bytes: int) -> None:
        """So many more are there already, whatever the limits."""
        self._num_bytes += num_bytes
        self._of_owner[owner] += num_bytes

    def count(self, num_bytes: int, owner: str | None = None) -> None:
        """So many more are kept, or fewer; None: nobody is charged yet. Raises `DiskFullError` where there is no room
        for more."""
        with self._lock:
            if num_bytes > 0 and self._num_bytes + num_bytes > self.max_bytes:
                raise DiskFullError(
                    f"files and answers take {self._num_bytes} of {self.max_bytes} bytes (--batch-disk-gib), and "
                    f"{num_bytes} more are needed; delete files that are not needed any more"
                )
            if owner is not None:
                self._check_owner(owner, num_bytes)
                self._of_owner[owner] += num_bytes
            self._num_bytes += num_bytes

    def charge(self, owner: str, num_bytes: int) -> None:
        """So many of those that were counted already, fewer if negative, are this owner's, whatever the limit."""
        with self._lock:
            self._of_owner[owner] += num_bytes

    def _check_owner(self, owner: str, num_bytes: int) -> None:
        used = self._of_owner[owner]
        if num_bytes > 0 and self.max_owner_bytes is not None and used + num_bytes > self.max_owner_bytes:
            raise QuotaError(
                f"files and answers of this key take {used} of {self.max_owner_bytes} bytes (--batch-key-gib), and "
                f"{num_bytes} more are needed; DELETE /v1/files/ID gives room, as does the expiry of files"
            )
