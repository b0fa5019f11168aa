"""Files that are replaced whole: whoever reads one sees the old content or the new, never a part.

Owns the file beside it and that file's end, whatever interrupts the writing; what is in it is the writer's matter.
"""

from __future__ import annotations

import os
from collections.abc import Callable
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
