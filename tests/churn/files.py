"""Ways to change an adapter's directory, each as people's tools do it: cp, rsync --inplace, mv, rm -r, tar.

Blocking. `source` is a content's directory, `target` the one that is served. A way that changes one file is for
contents of one family. `rng` decides speeds and pauses. `set_old_times` gives the files one fixed modification time, as
archives do: then size and mtime tell nothing.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

CHUNK = 256 * 1024
OLD_TIME_NS = 1_600_000_000 * 10**9

Way = Callable[[Path, Path, str, random.Random], None]


def _pause(rng: random.Random) -> Callable[[], None]:
    """What lies between two writes: nothing, most of the time; else some milliseconds."""
    if rng.random() < 0.6:
        return lambda: None
    longest_s = rng.choice([0.002, 0.02])
    return lambda: time.sleep(rng.uniform(0, longest_s))


def copy_over(source: Path, target: Path, file: str, rng: random.Random) -> None:
    """cp: truncate, then write."""
    pause = _pause(rng)
    with (source / file).open("rb") as new, (target / file).open("wb", buffering=0) as old:
        while chunk := new.read(CHUNK):
            old.write(chunk)
            pause()


def patch_in_place(source: Path, target: Path, file: str, rng: random.Random) -> None:
    """rsync --inplace: the old bytes stay until the new ones are over them; the size hardly ever differs."""
    pause = _pause(rng)
    with (source / file).open("rb") as new, (target / file).open("r+b", buffering=0) as old:
        while chunk := new.read(CHUNK):
            old.write(chunk)
            pause()
        old.truncate()


def preallocate(source: Path, target: Path, file: str, rng: random.Random) -> None:
    """A downloader: the whole length in zeros first."""
    pause = _pause(rng)
    with (source / file).open("rb") as new, (target / file).open("wb", buffering=0) as old:
        old.truncate((source / file).stat().st_size)
        while chunk := new.read(CHUNK):
            old.write(chunk)
            pause()


def replace_file(source: Path, target: Path, file: str, rng: random.Random) -> None:
    """mv over it, from a file beside the directory."""
    fresh = target.parent / f".{target.name}.new"
    shutil.copyfile(source / file, fresh)
    os.replace(fresh, target / file)


def truncate_and_restore(source: Path, target: Path, file: str, rng: random.Random) -> None:
    """A copy that was broken off, and made again."""
    size = (target / file).stat().st_size
    os.truncate(target / file, rng.choice([0, rng.randrange(size), size - 1]))
    time.sleep(rng.uniform(0.05, 2.0))
    copy_over(source, target, file, rng)


def remove_and_restore(source: Path, target: Path, file: str, rng: random.Random) -> None:
    """rm -r, then tar x: the files come one by one, in any order."""
    shutil.rmtree(target)
    time.sleep(rng.choice([0.0, rng.uniform(0.0, 2.0)]))
    target.mkdir()
    names = sorted(os.listdir(source))
    for name in rng.sample(names, len(names)):
        shutil.copyfile(source / name, target / name)


def swap_directory(source: Path, target: Path, file: str, rng: random.Random) -> None:
    """mv of the whole directory, away and in."""
    fresh, gone = target.parent / f".{target.name}.new", target.parent / f".{target.name}.old"
    shutil.copytree(source, fresh)
    os.rename(target, gone)
    os.rename(fresh, target)
    shutil.rmtree(gone)


IN_FILE: dict[str, Way] = {
    "copy over": copy_over,
    "patch in place": patch_in_place,
    "preallocate": preallocate,
    "truncate": truncate_and_restore,
    "replace file": replace_file,
}
WHOLE: dict[str, Way] = {"remove": remove_and_restore, "swap directory": swap_directory}


def set_old_times(target: Path) -> None:
    for path in target.iterdir():
        os.utime(path, ns=(OLD_TIME_NS, OLD_TIME_NS))
