"""One process at a time for the files of one output: a lock file beside them, which the kernel gives back.

However its holder ends, nobody waits for it. The file is removed by who made it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


@contextmanager
def held(path: Path, lock_file: Path, param: str) -> Iterator[None]:
    """Keep `path` and what belongs to it from other processes. Raises `UserError` where one has them."""
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file.open("wb")
    except OSError as error:
        raise UserError(f"cannot write to {lock_file.parent}: {error.strerror}", param=param) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Not one that its holder has just removed.
            is_held = lock_file.stat().st_ino == os.fstat(lock.fileno()).st_ino
        except OSError:
            is_held = False
        if not is_held:
            raise UserError(f"another process is writing {path}; wait for it, or give another output", param=param)
        try:
            yield
        finally:
            lock_file.unlink(missing_ok=True)
