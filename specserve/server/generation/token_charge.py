"""What a job takes of its key's tokens: reserved before it runs, charged by what it used when it ends.

Reserved are its prompts and as many tokens as all its sequences may give; where the client leaves that open, which in a
chat means all the room that there is, a guess stands for it. A job that ends before its first token, because its client
leaves or its time is over, is charged the prompt, or prompts would be free for whoever leaves in time; one that fails
before it is charged nothing.
"""

from __future__ import annotations

from ...messages import Delta
from .job import Job

GUESSED_TOKENS = 256  # of a sequence whose client names no limit


class TokenCharge:
    """Of one job. Raises `RateLimitedError` when its key has not the tokens now."""

    def __init__(self, job: Job):
        self._num_prompt_tokens = job.num_prompt_tokens
        self._num_generated = 0
        self._has_failed = False
        self._reservation = job.caller.allowance.reserve(self._num_prompt_tokens + _may_generate(job))

    def delta(self, delta: Delta) -> None:
        self._num_generated += len(delta.token_ids)

    def failed(self) -> None:
        self._has_failed = True

    def settle(self) -> int:
        """The tokens that were charged."""
        is_free = self._has_failed and not self._num_generated
        num_used = 0 if is_free else self._num_prompt_tokens + self._num_generated
        self._reservation.settle(num_used)
        return num_used


def _may_generate(job: Job) -> int:
    limit = job.requests[0].sampling.max_tokens
    if not job.names_limit:
        limit = min(limit, GUESSED_TOKENS)
    return limit * len(job.requests)
