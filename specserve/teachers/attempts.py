"""Further attempts at what may pass: waits that grow at random, or as long as an endpoint asks.

An endpoint that says 429 is up and has too much to do: that costs nobody an attempt, and pauses all requests to it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from .errors import TeacherError
from .pacing import Pacing
from .spec import TeacherSpec
from .usage import Usage

MAX_WAIT_S = 60.0  # between attempts, unless the endpoint asks for more
MAX_RETRY_AFTER_S = 600.0  # an endpoint that asks for more is not waited for
MAX_LIMITED = 100  # answers of 429 to one request
TOO_MANY = 429

Found = TypeVar("Found")


class Attempts:
    """At the requests to one teacher."""

    def __init__(self, spec: TeacherSpec, pacing: Pacing, usage: Usage):
        self._spec, self._pacing, self._usage = spec, pacing, usage

    async def __call__(self, attempt: Callable[[], Awaitable[Found]]) -> Found:
        """Raises `TeacherError` of the last attempt."""
        num_limited = 0

        def stop(state: RetryCallState) -> bool:
            nonlocal num_limited
            num_limited += _error_of(state).status == TOO_MANY
            return state.attempt_number - num_limited > self._spec.max_retries or num_limited >= MAX_LIMITED

        async def once() -> Found:  # tenacity tells by the function whether to await what it returns
            return await attempt()

        wait, may_pass = self._wait_s, retry_if_exception(self._may_pass)
        retrying = AsyncRetrying(retry=may_pass, stop=stop, wait=wait, sleep=self._pacing.sleep, reraise=True)
        return await retrying(once)

    def _may_pass(self, error: BaseException) -> bool:
        if not isinstance(error, TeacherError) or not error.retryable or self._pacing.has_ended:
            return False
        return error.retry_after_s is None or error.retry_after_s <= MAX_RETRY_AFTER_S

    def _wait_s(self, state: RetryCallState) -> float:
        self._usage.retries += 1
        error = _error_of(state)
        wait_s = error.retry_after_s
        if wait_s is None:
            wait_s = wait_random_exponential(multiplier=self._spec.retry_wait_s, max=MAX_WAIT_S)(state)
        if error.status == TOO_MANY or error.retry_after_s is not None:
            self._pacing.pause(wait_s)
        return wait_s


def _error_of(state: RetryCallState) -> TeacherError:
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, TeacherError)
    return error
