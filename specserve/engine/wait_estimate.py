"""How long a request would wait, from what is queued and how fast the engine serves.

Owns the rate: tokens served a second while all seats are taken, measured from window to window; until there is such a
window the cost table of the steps stands in for it, with an estimate of the host's work between them. Estimates are
bounds of the right order; they assume that outputs are as long as their adapter's were in the mean.
"""

from __future__ import annotations

from collections.abc import Callable

from ..drafting.cost_model import CostModel, StepShape
from ..messages import BACKGROUND_PRIORITY
from ..pooling_messages import AnyRequest
from ..schedule.background import num_others
from ..schedule.fair_queue import PROMPT_COST
from ..schedule.scheduler import Scheduler

_LEAST_WINDOW_S = 0.2
# The host's work between two forwards: CPU time of a Zen 3 core beside other work, 1 to 64 sequences without drafts.
_HOST_STEP_S, _HOST_SEQ_S = 1e-3, 1.5e-5
_RATE = 0.3  # share of what a window says that the running mean takes over


class WaitEstimate:
    """`step_seconds(n)` is what a step of n decoding sequences takes, before anything was measured."""

    def __init__(self, scheduler: Scheduler, step_seconds: Callable[[int], float]):
        self._scheduler = scheduler
        self._step_seconds = step_seconds
        self._served_per_s: float | None = None  # cost: output tokens, and prompt tokens at their price
        self._since: tuple[float, float, bool] | None = None  # when the window began: time, cost, full

    def observe(self, prompt_tokens: int, generated_tokens: int) -> None:
        """Learn from what was computed since the last call; both count from the engine's start."""
        now, cost, is_full = self._scheduler.clock(), PROMPT_COST * prompt_tokens + generated_tokens, self._is_full
        if self._since is not None:
            then, cost_then, was_full = self._since
            window_s = now - then
            if window_s < _LEAST_WINDOW_S:
                return
            if is_full and was_full and cost > cost_then:
                rate = (cost - cost_then) / window_s
                mean = self._served_per_s or rate
                self._served_per_s = mean + _RATE * (rate - mean)
        self._since = now, cost, is_full

    @property
    def typical_wait_s(self) -> float:
        """Of a request of priority 0 for an adapter of which none waits."""
        return self._wait_s(0, self._scheduler.waiting.cost_ahead("", "", 0), 0.0)

    def wait_s(self, request: AnyRequest) -> float:
        """Seconds until a request that comes now would begin to run; of several sequences the last."""
        ahead = self._scheduler.waiting.cost_ahead(request.caller, request.adapter_hash, request.priority)
        num = max(1, request.num_together)
        return self._wait_s(request.priority, ahead, num * self.expected_output(request), num)

    def first_token_s(self, request: AnyRequest) -> float:
        """Seconds until a request that comes now would have its first token.

        How long its answer is nobody knows, and what is refused for that is never learned from.
        """
        prompt_s = PROMPT_COST * len(request.prompt_token_ids) / self._rate
        return self.wait_s(request) + prompt_s + self._step_seconds(len(self._scheduler.running) + 1)

    @property
    def _is_full(self) -> bool:
        return not self._has_seats(1, BACKGROUND_PRIORITY)

    def _has_seats(self, num: int, priority: int) -> bool:
        """Whether `num` of that priority need not wait; those of background sequences are free for others."""
        scheduler = self._scheduler
        running = scheduler.running
        num_running = len(running) if priority >= BACKGROUND_PRIORITY else num_others(running)
        return not scheduler.waiting.minded_by(priority)[0] and num_running + num <= scheduler.max_num_seqs

    @property
    def _rate(self) -> float:
        num = self._scheduler.max_num_seqs
        return self._served_per_s or num / self._step_seconds(num)

    def _wait_s(self, priority: int, cost_ahead: float, own_cost: float, num: int = 1) -> float:
        """Until so much is served, and `num` seats are free for that priority."""
        return 0.0 if self._has_seats(num, priority) else (cost_ahead + own_cost) / self._rate

    def expected_output(self, request: AnyRequest) -> float:
        """Tokens, the mean of its adapter's."""
        waiting, max_tokens = self._scheduler.waiting, request.sampling.max_tokens
        return waiting.expected_output(request.caller, request.adapter_hash, request.priority, max_tokens)


def decode_step_s(costs: CostModel, scheduler: Scheduler, num: int) -> float:
    """What a step of `num` decoding sequences takes that are like those that run, before any was measured."""
    running = scheduler.running
    num_keys = sum([seq.num_computed for seq in running]) * num // len(running) if running else 0
    return costs.seconds(num, StepShape(num_seqs=num, num_keys=num_keys)) + _HOST_STEP_S + num * _HOST_SEQ_S
