"""One process at a time for the files of one output, and whether they can be written: before anything is paid for.

The lock is a file beside them, which the kernel gives back.
 However its holder ends, nobody waits for it. The file is removed by who made it.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
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


def check_writable(path: Path, beside: Sequence[Path], num_bytes: int, param: str) -> None:
    """Try what is done at the end: make `path`, of about so many bytes, and the files `beside` it.

    Raises `UserError`: who finds out then has paid for all that is to be written.
    """
    for each in (path, *beside):
        if each.is_dir():
            raise UserError(f"{each} would be written and is a folder; remove it, or give another output", param=param)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            with (Path(folder) / path.name).open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, num_bytes))
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            return  # a file system that sets nothing aside
        raise UserError(
            f"cannot write {path}, of some {num_bytes / 2**20:.1f} MiB: {error.strerror}; make room, or give another "
            "file",
            param=param,
        ) from None
