"""What a job takes of its key's tokens: reserved before it runs, charged by what it used when it ends.

Reserved are its prompts and as many tokens as all its sequences may give. A job that ends before its first token,
because its client leaves or its time is over, is charged the prompt, or prompts would be free for whoever leaves in
time; one that fails before it is charged nothing.
"""

from __future__ import annotations

from ...messages import Delta
from ..access.limits import Allowance


class TokenCharge:
    """Of one job. Raises `RateLimitedError` when its key has not the tokens now."""

    def __init__(self, allowance: Allowance, num_prompt_tokens: int, num_may_generate: int):
        self._num_prompt_tokens = num_prompt_tokens
        self._num_generated = 0
        self._has_failed = False
        self._reservation = allowance.reserve(num_prompt_tokens + num_may_generate)

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
