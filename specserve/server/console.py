"""Standard error as a place that may be gone: what is said there never fails, whoever does not listen.

Owns lines to people and how often a warning is repeated. `logging` itself swallows the errors of its streams.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time


def say(line: str) -> None:
    """Print a line to standard error; a reader that has gone or a disk that is full loses it."""
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def settle() -> None:
    """Before a process ends: give up lines that nobody takes, or the interpreter ends with 120 over them."""
    try:
        sys.stderr.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


class Seldom:
    """A warning that many causes repeat, said once in `every_s` with the number of those left out."""

    def __init__(self, logger: logging.Logger, every_s: float = 60.0):
        self._logger = logger
        self._every_s = every_s
        self._last: float | None = None
        self._num_left_out = 0

    def warn(self, message: str) -> None:
        now = time.monotonic()
        if self._last is not None and now - self._last < self._every_s:
            self._num_left_out += 1
            return
        more = f" ({self._num_left_out} more like it since the last such line)" if self._num_left_out else ""
        self._logger.warning("%s%s", message, more)
        self._last, self._num_left_out = now, 0
