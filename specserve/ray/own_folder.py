"""A folder for each replica below one that their settings share, so that no two of a machine write the same files.

The first that is free, by a lock that ends with the process: a replica that is started again finds what one before it
wrote, whatever Ray calls it now. The lock is on a file, as its engine locks the folder itself to write there.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from ..errors import UserError
from ..file_lock import FileLock

_LOCK_FILE = "lock"


class OwnFolder:
    """`path` is this process's until it is closed. Raises `UserError` where there can be none, named as `setting`."""

    def __init__(self, shared: str, setting: str):
        for number in itertools.count():
            self.path = Path(shared).expanduser().absolute() / f"replica-{number}"
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = FileLock(self.path / _LOCK_FILE)
            except OSError as error:
                raise UserError(f"{setting} {shared} cannot be used: {error.strerror}", param=setting) from None
            if self._lock.take():
                return
            self._lock.close()

    def close(self) -> None:
        self._lock.close()
