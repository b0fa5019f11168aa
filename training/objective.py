"""What a run minimises, as the trainer sees it: one protocol, which every task implements.

The trainer owns steps, optimizer, health and checkpoints; an objective owns the model, the rows and the loss. What an
objective computes is a function of the weights, of the step's number and of its own `state`, which checkpoints hold.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from .data.batching import plan_epoch


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters with one learning rate; `setting` is what a user lowers when their gradient is out of range."""

    parameters: list[nn.Parameter]
    lr: float  # at its peak
    setting: str
    weight_decay: float = 0.0


@dataclass(frozen=True, slots=True)
class StepLoss:
    """Of one process's part of a batch."""

    total: torch.Tensor  # scalar that is differentiated; the processes' gradients are summed
    loss_sum: torch.Tensor  # scalar; over all processes' targets it is the loss that health judges, step beside step
    values: dict[str, Any] = field(default_factory=dict)  # further ones for metrics.jsonl


class Objective(Protocol):
    """Batches are indices of rows."""

    def groups(self) -> list[Group]:
        """All that is trained, the LoRA first; the same tensors at every call."""
        ...

    def rates(self, step: int) -> list[float]:
        """Of each group, the share of its peak rate."""
        ...

    def begin(self, step: int) -> None:
        """Called before `step` is taken."""
        ...

    def num_targets(self, batch: Sequence[int]) -> int:
        """What the loss of `batch` is a mean over."""
        ...

    def num_tokens(self, batch: Sequence[int]) -> int: ...

    def step_loss(
        self, batch: Sequence[int], step: int, num_targets: float, num_processes: int, rng: random.Random
    ) -> StepLoss:
        """The loss of a part of a batch that has `num_targets` in all its parts; `rng` is the step's own."""
        ...

    def loss_sum(self, batch: Sequence[int]) -> torch.Tensor:
        """`StepLoss.loss_sum` alone."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the LoRA, of tensors and plain values."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


@torch.no_grad()
def mean_loss(objective: Objective, num_rows: int, batch_tokens: int) -> float:
    """The loss of the weights as they are over the objective's first `num_rows` rows, in batches of `batch_tokens`."""
    batches = plan_epoch([objective.num_tokens([idx]) for idx in range(num_rows)], batch_tokens, seed=0)
    total = sum(objective.loss_sum(batch).item() for batch in batches)
    return total / max(1, sum(objective.num_targets(batch) for batch in batches))
