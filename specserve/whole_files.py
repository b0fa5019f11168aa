"""Files that are replaced whole, and records that are appended whole: nobody reads a part as all of it.

Owns the file beside one that is replaced and that file's end, and what a record that did not fit leaves; what is
written is the writer's matter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path


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


def without_torn_end(file: FileIO) -> bytes:
    """The whole lines of a file of lines; half a line at its end, of a writer that was killed, is cut off."""
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        file.truncate(len(whole))
    return whole
