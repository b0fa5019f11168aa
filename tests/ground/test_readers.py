"""Threads that read: few, in order, replaced when they hang, and not for one file system alone."""

from __future__ import annotations

import threading

import pytest
from waiting import wait_until

from specserve.errors import OverloadedError
from specserve.readers import Readers

STUCK_S = 30.0


@pytest.fixture
def pool(clock):
    return Readers(2, STUCK_S, max_stuck=4, max_stuck_a_mount=2, clock=clock)


def test_work_is_done_in_order_by_few_threads_which_end(pool):
    go_on, done = threading.Event(), []

    def work(num):
        go_on.wait()
        done.append(num)
        if num == 3:
            raise ZeroDivisionError
        return num

    futures = [pool.submit(lambda num=num: work(num), 0) for num in range(6)]
    assert futures[4].cancel() and not futures[0].cancel() and len(pool._running) == 2
    go_on.set()
    assert [future.result(60) for future in futures[:3]] == [0, 1, 2]
    assert isinstance(futures[3].exception(60), ZeroDivisionError) and futures[5].result(60) == 5
    assert sorted(done) == [0, 1, 2, 3, 5] and 4 not in done
    wait_until(lambda: not any(thread.name == "adapter" for thread in threading.enumerate()))
    assert not pool._running and not pool._pending


def test_what_hangs_is_replaced_up_to_a_number_and_a_file_system_has_few_of_it(pool, clock):
    away = threading.Event()

    def hang(mount, num):
        for _ in range(num):
            pool.submit(away.wait, mount)

    def later():
        clock.now += STUCK_S + 1
        pool.look()

    try:
        hang(1, 5)
        later()
        assert pool.num_stuck(1) == 2 and len(pool._running) == 2 and pool.is_held_back(1)
        assert pool.submit(lambda: "other", 2).result(60) == "other"
        hang(2, 3)
        later()
        assert pool.num_stuck(2) == 2 and pool.num_stuck() == 4 and not pool.is_held_back(3)
        hang(3, 3)  # two more are replaced no more
        later()
        assert pool.num_stuck() == 6 and len(pool._running) == 6
        waits = pool.submit(lambda: "waits", 4)
        assert not waits.running()
    finally:
        away.set()
    assert waits.result(60) == "waits"
    wait_until(lambda: not pool._running and not pool._pending)
    assert pool.num_stuck() == 0


def test_what_is_cancelled_while_all_threads_hang_is_forgotten(pool):
    away = threading.Event()
    try:
        for mount in range(2):
            pool.submit(away.wait, mount)
        assert all(pool.submit(lambda: "late", mount).cancel() for mount in range(2, 50)) and not pool._pending
    finally:
        away.set()


def test_a_thread_that_cannot_be_started_fails_its_read_and_no_other(pool, monkeypatch):
    with monkeypatch.context() as patch:

        def refused(thread):
            raise RuntimeError("can't start new thread")

        patch.setattr(threading.Thread, "start", refused)
        error = pool.submit(lambda: 1, 0).exception(0)
        assert isinstance(error, OverloadedError) and "can't start" in str(error)
    assert pool.submit(lambda: 1, 0).result(60) == 1
