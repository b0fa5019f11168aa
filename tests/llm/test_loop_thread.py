"""The loop on a thread of its own: what `stop` does to those who wait for it."""

import asyncio
import threading
from concurrent.futures import Future

import pytest

from specserve.errors import EngineDeadError
from specserve.llm.loop_thread import LoopThread


def in_thread(function, *args):
    """Its result, to come; a thread that never ends does not keep the tests from ending."""
    future = Future()

    def run():
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Endless:
    """Work that does not end by itself; notes when it has begun, and what it left behind."""

    def __init__(self):
        self.has_begun, self.was_cancelled = threading.Event(), threading.Event()

    async def call(self):
        self.has_begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # as one that tells others
            self.was_cancelled.set()

    async def items(self):
        yield 1
        await self.call()


def wait_for_call(loop, work):
    loop.call(work.call())


def wait_for_items(loop, work):
    assert list(loop.iterate(work.items())) == [1]


def wait_for_acall(loop, work):
    asyncio.run(loop.acall(work.call()))


def wait_for_aitems(loop, work):
    async def read():
        assert [item async for item in loop.aiterate(work.items())] == [1]

    asyncio.run(read())


@pytest.mark.parametrize("wait", [wait_for_call, wait_for_items, wait_for_acall, wait_for_aitems])
def test_who_waits_for_a_loop_that_ends_is_told(wait):
    loop, work = LoopThread("test"), Endless()
    waiting = in_thread(wait, loop, work)
    assert work.has_begun.wait(30)
    loop.stop()
    with pytest.raises(EngineDeadError, match="closed before the answer"):
        waiting.result(30)
    assert work.was_cancelled.is_set()


def test_nothing_is_begun_on_a_loop_that_has_ended():
    loop, work = LoopThread("test"), Endless()
    loop.stop()
    loop.stop()
    with pytest.raises(EngineDeadError, match="is closed"):
        loop.call(work.call())
    assert not work.has_begun.is_set()


def test_callers_that_come_while_it_ends_are_answered_or_refused():
    loop = LoopThread("test")
    begun = threading.Barrier(5)

    async def work():
        await asyncio.sleep(0)
        return 1

    def ask():
        begun.wait()
        num = 0
        try:
            while True:
                num += loop.call(work())
        except EngineDeadError:
            return num

    asking = [in_thread(ask) for _ in range(4)]
    begun.wait()
    loop.call(work())
    loop.stop()
    assert all(future.result(30) >= 0 for future in asking)


def test_a_caller_that_is_cancelled_itself_is_so_after_the_end_as_well():
    loop, work = LoopThread("test"), Endless()

    async def main():
        task = asyncio.ensure_future(loop.acall(work.call()))
        await asyncio.to_thread(work.has_begun.wait, 30)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
    assert work.was_cancelled.wait(30)
    loop.stop()
