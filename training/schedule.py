"""How the rates of a run move with its steps: pure functions of the step's number and of how many steps there are.

The LoRA's rate rises in a warm-up of at least a few steps, since Adam's first updates are of full size, and falls as a
cosine. The head's own rate starts with the joint phase, and so does the weight of its gradient in the LoRA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .run_config import JointConfig, OptimizerConfig

_LEAST_WARMUP_STEPS = 4
_LARGEST_WARMUP = 0.25  # share of the steps that these may take
_FLOOR = 0.05  # of the peak rate, at the end


@dataclass(frozen=True, slots=True)
class Schedule:
    num_steps: int
    optimizer: OptimizerConfig
    joint: JointConfig

    @property
    def warmup_steps(self) -> float:
        """Of `optimizer.warmup`; 0 stays 0."""
        asked = self.optimizer.warmup * self.num_steps
        return max(asked, min(_LEAST_WARMUP_STEPS, _LARGEST_WARMUP * self.num_steps)) if asked else 0.0

    def rate(self, step: int) -> float:
        """The LoRA's rate as a share of its peak."""
        if step < self.warmup_steps:
            return (step + 1) / max(1.0, self.warmup_steps)
        progress = (step - self.warmup_steps) / max(1e-9, self.num_steps - self.warmup_steps)
        return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))

    def head_rate(self, step: int) -> float:
        """The head's rate as a share of its peak."""
        start = self.joint.start
        progress = (step / max(1, self.num_steps) - start) / max(1e-9, 1 - start)
        return min(1.0, max(0.0, progress) / 0.05 + 0.05) if progress >= 0 else 0.0

    def head_weight(self, step: int) -> float:
        """Weight of the head's gradient in the LoRA; 0 while the LoRA trains alone."""
        progress = step / max(1, self.num_steps) - self.joint.start
        if progress < 0 or self.joint.head_weight == 0:
            return 0.0
        return self.joint.head_weight * min(1.0, (progress + 1e-3) / max(1e-3, self.joint.warmup))
