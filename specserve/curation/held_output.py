"""One process at a time for the files of one output: a lock file beside them, which the kernel gives back.

However its holder ends, nobody waits for it. The file is removed by who made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..file_lock import FileLock


@contextmanager
def held(path: Path, lock_file: Path, param: str) -> Iterator[None]:
    """Keep `path` and what belongs to it from other processes. Raises `UserError` where one has them."""
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_file)
        is_ours = lock.take()
    except OSError as error:
        raise UserError(f"cannot write to {lock_file.parent}: {error.strerror}", param=param) from None
    with lock:
        if not (is_ours and lock.is_in_place):  # not one that its holder has just removed
            raise UserError(f"another process is writing {path}; wait for it, or give another output", param=param)
        try:
            yield
        finally:
            lock_file.unlink(missing_ok=True)
