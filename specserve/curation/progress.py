"""The bars of commands that make rows: one form, on a terminal only."""

from __future__ import annotations

from tqdm import tqdm

_DESC_LEN = 40


def progress(name: str, total: int, done: int = 0) -> tqdm:
    """A bar of `total`, of which `done` are behind it; of a long name the end is shown."""
    desc = name if len(name) <= _DESC_LEN else f"...{name[3 - _DESC_LEN :]}"
    return tqdm(total=total, initial=done, desc=desc, unit="", disable=None, dynamic_ncols=True)
