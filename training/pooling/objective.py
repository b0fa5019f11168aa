"""What the objectives of embed, rerank and classify share: rates, counts, and a step of rows that each have a loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from ..objective import Group, StepLoss
from ..run_config import RunConfig
from ..schedule import Schedule
from .examples import PoolingExample
from .model import PoolingModel


class PoolingObjective:
    """A row is a target: the loss is a mean over rows. Tasks say what rows lose."""

    def __init__(self, config: RunConfig, model: PoolingModel, examples: Sequence[PoolingExample], num_steps: int):
        self.config, self.model, self.examples = config, model, examples
        self._schedule = Schedule(num_steps, config.optimizer, config.joint)

    def row_losses(self, batch: Sequence[int]) -> torch.Tensor:
        """Losses of the rows of `batch`, [len(batch)]."""
        raise NotImplementedError

    def groups(self) -> list[Group]:
        opt = self.config.optimizer
        return [Group(self.model.parameters, opt.lr, "optimizer.lr", opt.weight_decay)]

    def rates(self, step: int) -> list[float]:
        return [self._schedule.rate(step)]

    def begin(self, step: int) -> None:
        """Nothing to do."""

    def num_targets(self, batch: Sequence[int]) -> int:
        return len(batch)

    def num_tokens(self, batch: Sequence[int]) -> int:
        return sum(len(text) for idx in batch for text in self.examples[idx].texts)

    def step_loss(
        self, batch: Sequence[int], step: int, num_targets: float, num_processes: int, rng: random.Random
    ) -> StepLoss:
        loss_sum = self.row_losses(batch).sum()
        return StepLoss(loss_sum / num_targets, loss_sum)

    def loss_sum(self, batch: Sequence[int]) -> torch.Tensor:
        return self.row_losses(batch).sum()

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""
