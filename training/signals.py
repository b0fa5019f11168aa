"""How a run is stopped: between two steps, so that what it has can be kept."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import UserError


class Interrupted(UserError):
    """The run was stopped by a signal between two steps."""

    status = 499


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Within: SIGINT and SIGTERM only raise a flag, read between steps."""
    seen: list[int] = []
    old = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, lambda received, frame: seen.append(received))
    except ValueError:  # not the main thread: the caller handles signals
        pass
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
