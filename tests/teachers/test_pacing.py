"""When requests may leave, on a clock of the test's own."""

from __future__ import annotations

import asyncio

import pytest

from specserve.teachers import TeacherSpec
from specserve.teachers.pacing import Pacing


class Time:
    now = 0.0


@pytest.fixture
def paced(monkeypatch):
    """Makes a pacing whose waits pass at once."""
    time = Time()

    async def sleep(self, seconds):
        time.now += seconds
        await asyncio.sleep(0)

    monkeypatch.setattr(Pacing, "sleep", sleep)
    return lambda **limits: (Pacing(TeacherSpec(model="m", url="u", **limits), lambda: time.now), time)


async def leave(pacing, time, tokens):
    """The moments at which requests of so many tokens leave."""

    async def one(num):
        await pacing.turn(num)
        return round(time.now, 3)

    return await asyncio.gather(*map(one, tokens))


async def test_a_minute_s_requests_leave_at_once_and_others_evenly(paced):
    assert await leave(*paced(requests_per_minute=3), [1] * 6) == [0, 0, 0, 20, 40, 60]


async def test_tokens_are_reserved_and_settled(paced):
    pacing, time = paced(tokens_per_minute=60)
    assert await leave(pacing, time, [40, 40]) == [0, 20]
    pacing.settle(40, 10)
    assert await leave(pacing, time, [30]) == [20]
    pacing.settle(30, 90)
    assert await leave(pacing, time, [30]) == [110]
    assert await leave(pacing, time, [600]) == [pytest.approx(170)], "more than a minute's waits for all of one"


async def test_a_pause_holds_up_those_that_wait_in_their_order(paced):
    pacing, time = paced(requests_per_minute=1000)
    pacing.pause(5)
    pacing.pause(3)
    assert await leave(pacing, time, [1] * 3) == [5, 5, 5]


async def test_the_end_lets_all_go():
    pacing = Pacing(TeacherSpec(model="m", url="u"))
    pacing.pause(600)
    waiting = asyncio.create_task(pacing.turn(1))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    pacing.end()
    await asyncio.wait_for(waiting, 5)
