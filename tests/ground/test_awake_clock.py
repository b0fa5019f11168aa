"""Clocks of timeouts: what others take from a process does not count."""

import time

from specserve.awake_clock import AwakeClock, CoreWaits


def test_a_long_gap_counts_as_two_ticks_and_time_without_a_core_as_none(monkeypatch):
    times = iter((0.0, 1.0, 61.0, 62.0, 63.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    clock = AwakeClock(1.0)
    assert [clock.tick(without_core_s) for without_core_s in (0.0, 0.0, 0.75, 5.0)] == [1.0, 3.0, 3.25, 3.25]


def test_the_thread_that_waited_longest_for_a_core_counts(tmp_path):
    def write(**waits):
        for thread, wait in waits.items():
            (tmp_path / thread).mkdir(exist_ok=True)
            (tmp_path / thread / "schedstat").write_text(f"5000 {wait} 7\n")

    write(a=10**9, b=2 * 10**9)
    waits = CoreWaits(str(tmp_path))
    assert waits.take() == 0
    write(a=3 * 10**9, b=3 * 10**9)
    assert waits.take() == 2.0
    write(c=10**9)  # a thread of just now
    (tmp_path / "d").mkdir()  # and one that has ended
    assert waits.take() == 1.0


def test_a_system_that_does_not_count_says_nothing(tmp_path):
    assert CoreWaits(str(tmp_path / "none")).take() == 0.0
    assert CoreWaits(str(tmp_path)).take() == 0.0
