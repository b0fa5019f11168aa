"""Whether a run is going well, from its losses: what stops it, and which weights are worth a checkpoint.

The loss of a step judges the weights that the steps before it left. Good losses are near the best that the run has held
for some steps, and not above the loss before training. A run is stopped much later: one hard batch is no divergence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import UserError

_STOP_RATIO = 4.0  # times the first loss
_STOP_AFTER = 10  # steps: the first ones may jump
_STOP_STREAK = 20  # steps in a row with a loss above that before training
_GOOD_RATIO, _GOOD_MARGIN = 1.5, 0.3  # over the best running loss
_END_RATIO, _END_MARGIN = 1.25, 0.1  # over the first loss
_DECAY = 0.7  # of the running loss


class RunCollapsed(UserError):
    """The weights of a run, or of its head, are worth nothing: they diverged, or hold what is no number."""


@dataclass(slots=True)
class Health:
    """What is remembered of the losses so far; a checkpoint keeps it."""

    first: float | None = None
    running: float = math.inf  # weighted mean
    best: float = math.inf  # the lowest that it has been
    streak: int = 0

    def problem(self, step: int, loss: float, norm: float) -> str | None:
        """Why the run must stop before it takes the gradient of `loss`, the loss after `step` steps; None: go on."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"the loss is {loss} and the gradient's norm {norm}"
        if norm == 0.0 and loss == 0.0:  # rows that leave nothing to learn, as a query without other documents
            return None
        if norm == 0.0 and step == 0:
            return "the LoRA has no gradient: no token with loss reaches its target_modules"
        if norm == 0.0:
            return f"the gradient is gone: {step} steps have driven the weights out of range, the loss is {loss:.2f}"
        first = loss if self.first is None else self.first
        if step > _STOP_AFTER and loss > _STOP_RATIO * max(first, 1.0):
            return f"the loss rose from {first:.2f} to {loss:.2f}"
        if self.streak >= _STOP_STREAK:
            return f"the loss has been above that before training ({first:.2f}) for {self.streak} steps: {loss:.2f}"
        return None

    def is_good(self, loss: float) -> bool:
        """Whether weights of this loss may become a checkpoint."""
        limit = math.inf
        if self.first is not None:
            limit = min(_GOOD_RATIO * self.best + _GOOD_MARGIN, self._first_limit(self.first))
        return math.isfinite(loss) and loss <= limit

    def is_good_end(self, loss: float) -> bool:
        """The same for the finished weights and the rows of the first step, whose loss before training is known."""
        return math.isfinite(loss) and (self.first is None or loss <= self._first_limit(self.first))

    def see(self, loss: float) -> None:
        """Remember the loss of a step that is taken."""
        if self.first is None:
            self.first = self.running = loss
        self.running = _DECAY * self.running + (1 - _DECAY) * loss
        self.best = min(self.best, self.running)
        self.streak = self.streak + 1 if loss > self._first_limit(self.first) else 0

    @staticmethod
    def _first_limit(first: float) -> float:
        return _END_RATIO * first + _END_MARGIN
