"""What a forward leaves behind for the sampler, for log-probabilities, for lookahead heads and of pooled texts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from ..schedule.row_group import RowGroup
from ..schedule.scheduler import ScheduledSequence


@dataclass(frozen=True, slots=True)
class PooledOutput:
    """Of the `items` whose texts end with a step; `values` waits for them."""

    items: list[ScheduledSequence]
    values: Callable[[], np.ndarray]  # [items, H] float32: means of hidden states, or those of the last token


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Logits [L, V] float32; `groups` are the rows to sample, those of `items`."""

    logits: torch.Tensor
    groups: list[RowGroup]
    items: list[ScheduledSequence]
    prompt_rows: list[tuple[ScheduledSequence, int, int]]  # (item, first row, number of rows)
    hidden: torch.Tensor  # [L, H], normed
    taps: dict[int, torch.Tensor]  # layer -> its output [L, H], for the layers that heads read; rows behind L: pooled
    pooled: PooledOutput | None = None
