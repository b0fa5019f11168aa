"""Ends a step before it is done, when another thread asks for that: looked at between layers, on the native path alone.

Such a step has changed nothing but keys and values of rows that nobody counts as computed, which the next one writes
again. So it costs its time, and no token.
"""

from __future__ import annotations

import ctypes


class StepInterruptedError(Exception):
    """The step was ended before it was done; it gave nothing."""


class StepInterrupt:
    """Of one engine's steps. Any thread may ask; the rest is the engine's."""

    def __init__(self) -> None:
        self._asked = ctypes.c_int32(0)
        self.is_heeded = False  # by the step that is about to run

    def ask(self) -> None:
        """End the step that runs, or is about to, if it heeds that."""
        self._asked.value = 1

    def clear(self) -> None:
        """Whoever asked so far is heard."""
        self._asked.value = 0

    @property
    def address(self) -> int | None:
        """Of the int32 that is not 0 where a step shall end; None: it runs to its end."""
        return ctypes.addressof(self._asked) if self.is_heeded else None
