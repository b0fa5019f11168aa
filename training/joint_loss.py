"""The two losses of a training step, from one forward of the base model with its LoRA: the answers' cross-entropy, and
the head's over the steps ahead.

The head always learns at full strength. What of its gradient reaches the LoRA, through the hidden states that the head
starts from, is `reach`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .data.dataset import Example
from .head_module import LookaheadHead, build_anchors
from .lora_model import Hidden, LoraModel
from .losses import head_loss, teacher_log_probs
from .run_config import HeadConfig

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

    def lora_loss_sum(self) -> torch.Tensor:
        """Cross-entropy, summed over the tokens with loss."""
        return F.cross_entropy(self.logits, self.hidden.targets, reduction="sum")

    def head_loss(
        self, head: LookaheadHead, config: HeadConfig, copy_start: int, reach: float, rng: random.Random
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean loss of the head, and its greedy hit rate [K] by step ahead."""
        starts, row = [], 0
        for example in self.batch:
            num_loss = sum(example.loss_mask[1:])
            starts.append(row + num_loss - len(example.completion))
            row += num_loss
        anchors = build_anchors(
            self.batch, starts, head.vocab, config.train_steps_ahead, copy_start, config.copy_window
        )
        if len(anchors) > MAX_ANCHORS:
            anchors = anchors.select(torch.tensor(sorted(rng.sample(range(len(anchors)), MAX_ANCHORS))))
        last, tapped = (_scale_gradient(rows[anchors.rows], reach) for rows in (self.hidden.last, self.hidden.tapped))
        teacher = None
        if config.loss != "ce":
            vocab = torch.tensor(head.vocab, device=self.logits.device)
            teacher = teacher_log_probs(self.logits.detach(), vocab)
        return head_loss(head, last, tapped, anchors, config.step_decay, config.loss, teacher)


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
