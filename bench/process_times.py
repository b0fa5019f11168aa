"""Whose CPU time it was: of a server and all below it, by what each process is."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

from .server_process import children, cpu_s

ENGINES, REPLICAS, FRONT, RAY = "engines", "replicas", "front", "Ray"
_BY_WORDS = {
    "specserve.engine.process": ENGINES,
    "ray::ServeReplica:specserve:EngineReplica": REPLICAS,
    "ray::ServeReplica:specserve:Front": FRONT,
    "specserve.cli serve": FRONT,
}


def cpu_seconds(pid: int) -> dict[str, float]:
    """Of `pid` and all processes below it that run now, since each began."""
    times: Counter[str] = Counter()
    for each in _family(pid):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            times[_role(each)] += cpu_s(each)
    return dict(times)


def taken(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Seconds between two looks; a process that has ended counts as nothing."""
    return {role: max(0.0, seconds - before.get(role, 0.0)) for role, seconds in after.items()}


def _family(pid: int) -> set[int]:
    found, new = {pid}, {pid}
    while new:
        new = {each for parent in new for each in children(parent)} - found
        found |= new
    return found


def _role(pid: int) -> str:
    command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return next((role for words, role in _BY_WORDS.items() if words in command), RAY)
