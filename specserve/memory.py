"""Gives freed memory back to the system: what comes and goes in large pieces stays with the allocator otherwise."""

from __future__ import annotations

import ctypes


def give_memory_back() -> None:
    """Tens of milliseconds at most, and other threads go on; nothing happens with allocators other than glibc's."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
