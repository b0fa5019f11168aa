"""Files that are replaced whole, and records that are appended whole: nobody reads a part as all of it.

Owns the file beside one that is replaced and that file's end, and what a record that did not fit leaves; what is
written is the writer's matter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path

_LOOKED_AT = 1 << 16  # bytes


def replace_file(path: Path, write: Callable[[Path], object], *, sync: bool = False) -> None:
    """Let `write` make a file beside `path`, then put it in its place; an error leaves `path` as it was.

    With `sync` the new content is on the disk before the old goes, so that one of them outlives a loss of power.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        if sync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append_whole(file: FileIO, record: bytes) -> None:
    """Write `record` at the end of an unbuffered file; what cannot be written whole, as on a full disk, is taken back.

    Raises the `OSError` that it met. The file is this process's alone meanwhile.
    """
    end = file.seek(0, os.SEEK_END)
    rest = memoryview(record)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(end)
        raise


def cut_torn_end(file: FileIO) -> int:
    """Cut off half a line at the end of an unbuffered file of lines, of a writer that was killed; returns its size."""
    size = end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _LOOKED_AT)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        end = start
        if found >= 0:
            end = start + found + 1
            break
    if end < size:
        file.truncate(end)
    return end
