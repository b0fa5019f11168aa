"""Processes that end with the one that started them, however that ends: its end of a pipe is their standard input."""

from __future__ import annotations

import os
import signal
import sys
import threading


def end_with_parent() -> None:
    """From now on: this process gets a SIGTERM when the other end of its standard input closes."""
    threading.Thread(target=_wait, name="leash", daemon=True).start()


def _wait() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
