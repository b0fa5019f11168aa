"""Markers in text that comes in pieces."""

from __future__ import annotations


def overlap(text: str, marker: str) -> int:
    """The length of the longest end of `text` that may be the start of `marker`: what has to wait for more."""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)
