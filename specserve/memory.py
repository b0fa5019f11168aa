"""How much memory this process may still take, and giving back what it no longer needs."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path


def give_memory_back() -> None:
    """To the system: what comes and goes in large pieces stays with the allocator otherwise.

    Tens of milliseconds at most, and other threads go on; nothing happens with allocators other than glibc's.
    """
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that is free, caches of files included, within the limit of the process's control group.

    Half of the machine's where the system does not say. `root` is where proc and sys are.
    """
    limits = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        limits.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    with contextlib.suppress(OSError):
        groups = (root / "proc/self/cgroup").read_text().splitlines()
        limits += [left for line in groups for left in _left_of_groups(root / "sys/fs/cgroup", line)]
    return max(0, min(limits, default=physical_bytes() // 2))


def physical_bytes() -> int:
    """All main memory, in use or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _left_of_groups(root: Path, line: str) -> list[int]:
    """What a line of /proc/self/cgroup leaves: of its group and of all above it, as far as they can be seen."""
    _, controllers, path = line.split(":", 2)
    if controllers not in ("", "memory"):
        return []
    names = ("memory.max", "memory.current", "inactive_file") if not controllers else (
        "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")  # fmt: skip
    base, left = root / controllers, []
    group = base / path.lstrip("/")
    for directory in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError):
            limit, used = (int((directory / name).read_text()) for name in names[:2])
            stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
            left.append(limit - used + int(stat.get(names[2], 0)))
        if directory == base:
            break
    return left
