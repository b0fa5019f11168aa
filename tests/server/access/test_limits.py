"""Limits of a key, on a clock that the test turns."""

from __future__ import annotations

import random

import pytest

from specserve.errors import RateLimitedError
from specserve.server.access.limits import Allowance, Limits, duration


def allowance(clock, **limits) -> Allowance:
    return Allowance("team", Limits(**limits), clock)


def ask(allowance) -> None:
    with allowance.running():
        pass


def test_requests_over_the_limit_wait_as_long_as_they_are_told(clock):
    team = allowance(clock, requests_per_minute=3)
    for _ in range(3):
        ask(team)
    with pytest.raises(RateLimitedError, match="requests_per_minute 3") as refusal:
        ask(team)
    assert refusal.value.retry_after_s == pytest.approx(20) and refusal.value.type == "requests"
    clock.now += refusal.value.retry_after_s - 0.1
    with pytest.raises(RateLimitedError):
        ask(team)
    clock.now += 0.1
    ask(team)


def test_requests_at_a_time_are_given_back_however_they_end(clock):
    team = allowance(clock, max_concurrent=1)
    with pytest.raises(ZeroDivisionError), team.running():
        with pytest.raises(RateLimitedError, match="max_concurrent is 1"):
            ask(team)
        raise ZeroDivisionError
    ask(team)
    assert team.num_running == 0


def test_tokens_that_were_not_used_are_given_back_and_more_than_reserved_is_a_debt(clock):
    team = allowance(clock, tokens_per_minute=600)
    reservation = team.reserve(500)
    assert team.headers()["x-ratelimit-remaining-tokens"] == "100"
    reservation.settle(20)
    reservation.settle(20)
    assert team.headers()["x-ratelimit-remaining-tokens"] == "580"
    team.reserve(100).settle(700)  # 120 more than there were
    assert team.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimitedError) as refusal:
        team.reserve(10)
    assert refusal.value.retry_after_s == pytest.approx(13) and refusal.value.type == "tokens"
    clock.now += 13
    team.reserve(10)


def test_a_request_larger_than_a_minute_runs_when_the_bucket_is_full(clock):
    team = allowance(clock, tokens_per_minute=100)
    reservation = team.reserve(10**6)
    assert team.headers()["x-ratelimit-reset-tokens"] == "1m0s"  # it took what there was
    reservation.settle(1000)
    with pytest.raises(RateLimitedError) as refusal:
        team.reserve(10**6)
    clock.now += refusal.value.retry_after_s
    team.reserve(10**6)


def test_over_an_hour_of_any_requests_no_more_tokens_run_than_the_limit_and_one_burst(clock):
    team, rng, num_used = allowance(clock, tokens_per_minute=1000), random.Random(1), 0
    for _ in range(3600):
        clock.now += 1
        reserved, used = rng.randrange(1, 500), rng.randrange(1, 300)
        try:
            reservation = team.reserve(reserved)
        except RateLimitedError:
            continue
        reservation.settle(used)
        num_used += used
    assert 0.9 * 60 * 1000 < num_used <= 61 * 1000 + 300


def test_new_limits_keep_what_is_used_and_what_runs(clock):
    team = allowance(clock, requests_per_minute=10, max_concurrent=5)
    with team.running():
        team.set_limits(Limits(requests_per_minute=2, max_concurrent=1))
        with pytest.raises(RateLimitedError, match="max_concurrent"):
            ask(team)
    ask(team)
    with pytest.raises(RateLimitedError, match="requests_per_minute 2"):
        ask(team)
    team.set_limits(Limits())
    ask(team)
    assert team.headers() == {}


def test_headers_are_those_of_openai(clock):
    team = allowance(clock, requests_per_minute=60, tokens_per_minute=6000)
    with team.running():
        team.reserve(3000)
    assert team.headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "3000",
        "x-ratelimit-reset-tokens": "30s",
    }


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0201, "21ms"), (1.234, "1.23s"), (59.99, "60s"), (119.5, "2m0s"), (360, "6m0s")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
