"""The two losses of a generation run's step, from one forward of the base model with its LoRA: the answers'
(answer_loss.py), and the head's over the steps ahead.

The head always learns at full strength. What of its gradient reaches the LoRA, through the hidden states that the head
starts from, is `reach`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .answer_loss import known_tops, token_losses, top_kl, whole_kl
from .data.dataset import Example
from .head_fit import anchors_of
from .head_module import LookaheadHead
from .lora_model import Hidden, LoraModel
from .losses import TargetProbs, head_loss
from .objective import Group, StepLoss
from .run_config import HeadConfig, RunConfig
from .schedule import Schedule
from .teacher_model import Teacher

MAX_ANCHORS = 160  # of a step's completion tokens, how many the head is trained on; the refit sees all of them


@dataclass(frozen=True, slots=True)
class Forward:
    """What both losses of `batch` are made of; logits: [R, V] in fp32, of the rows with loss."""

    batch: Sequence[Example]
    hidden: Hidden
    logits: torch.Tensor

    @classmethod
    def of(cls, model: LoraModel, batch: Sequence[Example]) -> Forward:
        hidden = model.hidden(batch)
        return cls(batch, hidden, model.logits(hidden.last).float())

    def lora_loss_sum(self, config: RunConfig, teacher: Teacher | None) -> torch.Tensor:
        """Of `config.loss`, by the rows' weights, summed over the tokens with loss.

        Without a `teacher` from what the rows know of one.
        """
        kl = None
        if config.loss != "ce" and teacher is not None:
            kl = whole_kl(self.logits, teacher.logits(self.batch), config.kl.temperature)
        elif config.loss != "ce":
            kl = top_kl(self.logits, *known_tops(self.batch, self.logits.device), config.kl.temperature)
        losses = token_losses(config.loss, self.logits, self.hidden.targets, kl, config.kl.weight)
        if all(example.weight == 1.0 for example in self.batch):
            return losses.sum()
        nums = [sum(example.loss_mask[1:]) for example in self.batch]
        weights = losses.new_tensor([example.weight for example in self.batch])
        return (losses * weights.repeat_interleave(torch.tensor(nums, device=weights.device))).sum()

    def head_loss(
        self, head: LookaheadHead, config: HeadConfig, copy_start: int, reach: float, rng: random.Random
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss of the head, and its greedy hit rate [K] by step ahead."""
        starts, row = [], 0
        for example in self.batch:
            num_loss = sum(example.loss_mask[1:])
            starts.append(row + num_loss - len(example.completion))
            row += num_loss
        anchors = anchors_of(head, config, self.batch, starts, copy_start)
        if len(anchors) > MAX_ANCHORS:
            anchors = anchors.select(torch.tensor(sorted(rng.sample(range(len(anchors)), MAX_ANCHORS))))
        last, tapped = (_scale_gradient(rows[anchors.rows], reach) for rows in (self.hidden.last, self.hidden.tapped))
        teacher = None
        if config.loss != "ce":
            vocab = torch.tensor(head.vocab, device=self.logits.device)
            teacher = TargetProbs.of(self.logits.detach(), vocab)
        return head_loss(head, last, tapped, anchors, config.step_decay, config.loss, teacher)


class JointObjective:
    """The LoRA alone for a share of `num_steps`, then LoRA and head together; `head` None: the LoRA alone."""

    def __init__(
        self,
        config: RunConfig,
        model: LoraModel,
        head: LookaheadHead | None,
        examples: Sequence[Example],
        copy_start: int,
        num_steps: int,
        teacher: Teacher | None = None,
    ):
        self.config, self.model, self.head, self.teacher = config, model, head, teacher
        self.examples, self.copy_start = examples, copy_start
        self.schedule = Schedule(num_steps, config.optimizer, config.joint)

    def groups(self) -> list[Group]:
        opt = self.config.optimizer
        groups = [Group(self.model.parameters, opt.lr, "optimizer.lr", opt.weight_decay)]
        if self.head is not None:
            groups.append(Group(list(self.head.parameters()), self.config.head.lr, "head.lr"))
        return groups

    def rates(self, step: int) -> list[float]:
        rates = [self.schedule.rate(step), self.schedule.head_rate(step)]
        return rates if self.head is not None else rates[:1]

    def begin(self, step: int) -> None:
        """Nothing to do."""

    def num_targets(self, batch: Sequence[int]) -> int:
        return sum(sum(self.examples[idx].loss_mask[1:]) for idx in batch)

    def num_tokens(self, batch: Sequence[int]) -> int:
        return sum(len(self.examples[idx].tokens) for idx in batch)

    def step_loss(
        self, batch: Sequence[int], step: int, num_targets: float, num_processes: int, rng: random.Random
    ) -> StepLoss:
        forward = Forward.of(self.model, [self.examples[idx] for idx in batch])
        loss_sum = forward.lora_loss_sum(self.config, self.teacher)
        total = loss_sum / num_targets
        values: dict[str, Any] = {}
        weight = self.schedule.head_weight(step)
        if self.head is not None and weight > 0:
            reach = 0.0 if rng.random() < self.config.joint.detach_prob else weight
            extra, rate = forward.head_loss(self.head, self.config.head, self.copy_start, reach, rng)
            total = total + extra / num_processes
            values["head_loss"] = extra.item()  # sync: one number a step, for the log
            values["head_hit_rate"] = [round(value, 4) for value in rate.tolist()]
        return StepLoss(total, loss_sum, values)

    def loss_sum(self, batch: Sequence[int]) -> torch.Tensor:
        forward = Forward.of(self.model, [self.examples[idx] for idx in batch])
        return forward.lora_loss_sum(self.config, self.teacher)

    def state(self) -> dict[str, Any]:
        return {"head": None if self.head is None else self.head.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.head is not None:
            self.head.load_state_dict(state["head"])


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.scale, None


def _scale_gradient(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x.detach() if scale == 0.0 else _ScaleGradient.apply(x, scale)
