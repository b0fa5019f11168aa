"""What a forward leaves behind for the sampler, for log-probabilities and for lookahead heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..schedule.row_group import RowGroup
from ..schedule.scheduler import ScheduledSequence


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Logits [L, V] float32; `groups` are the rows to sample, those of `items`."""

    logits: torch.Tensor
    groups: list[RowGroup]
    items: list[ScheduledSequence]
    prompt_rows: list[tuple[ScheduledSequence, int, int]]  # (item, first row, number of rows)
    hidden: torch.Tensor  # [L, H], normed
    taps: dict[int, torch.Tensor]  # layer -> its output [L, H], for the layers that heads read
