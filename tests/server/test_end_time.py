"""A wait is cut when its time comes, and by nothing of ours otherwise."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from specserve.server.generation.end_time import EndTime


async def items(*pauses_s: float):
    for idx, pause_s in enumerate(pauses_s):
        if pause_s:
            await asyncio.sleep(pause_s)
        yield idx


def soon(s: float) -> float:
    return asyncio.get_running_loop().time() + s


async def test_waits_that_end_in_time_and_the_pauses_between_them_are_not_cut():
    with EndTime(soon(0.5)) as end:
        source = items(0, 0.001, 0, 60)
        assert [await end.next_of(source) for _ in range(2)] == [0, 1]
        await asyncio.sleep(0.51)
        assert end.has_come and await end.next_of(source) == 2  # it was there
        with pytest.raises(TimeoutError):
            await end.next_of(source)
        assert await end.next_of(source) is None  # the cut ended it
    await asyncio.sleep(0)  # what was scheduled finds nobody
    assert asyncio.current_task().cancelling() == 0


async def test_a_cancellation_from_elsewhere_goes_on():
    async def wait(end_s: float, source):
        with EndTime(soon(end_s)) as end:
            await end.next_of(source)

    async def swallow():
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        yield "swallowed"

    cancelled = asyncio.create_task(wait(60, items(60)))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    late = asyncio.create_task(wait(0.01, swallow()))
    await late
    assert late.cancelling() == 0
