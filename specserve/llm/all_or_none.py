"""Works of one call that end together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


async def all_or_none(works: Iterable[Any]) -> None:
    """Run all; when one fails or this is cancelled, the others are over before the error is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
