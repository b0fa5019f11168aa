"""Under which address others reach what listens on a machine."""

from __future__ import annotations

import re

_ALL = re.compile(r"//(0\.0\.0\.0|\[::\]):")  # hosts that stand for all addresses of a machine


def by_address(url: str, address: str) -> str:
    """`url`, but by `address` where its host stands for all addresses of the machine that has it."""
    host = f"[{address}]" if ":" in address else address
    return _ALL.sub(f"//{host}:", url, count=1)
