"""Adds up the hidden states of pooled rows on the host, for the torch and the native path.

What a text's rows of earlier steps came to lies at its sequence. `cuda/pooled.py` is the counterpart on a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..kernels.pooled_rows import sum_rows
from ..schedule.pooled_rows import PooledSpan
from .step_output import PooledOutput


def rows_of(spans: Sequence[PooledSpan]) -> list[int]:
    """The rows of the step that are pooled, span by span."""
    return [row for span in spans for row in range(span.first_row, span.first_row + span.num_rows)]


def add_up(spans: Sequence[PooledSpan], hidden: torch.Tensor) -> PooledOutput | None:
    """Of `hidden` [rows, H], the rows of all `spans`; None where none ends with this step."""
    values, start = hidden.float().cpu().numpy(), 0  # sync: nothing on a CPU; on others this path is the reference
    sums = []
    for span in spans:
        seq, rows, start = span.item.seq, values[start : start + span.num_rows], start + span.num_rows
        sums.append(sum_rows(rows, span.position, span.is_weighted, seq.pooled_sum if span.goes_on else None))
    for span, total in zip(spans, sums, strict=True):  # all or none: a step that fails is tried again
        span.item.seq.pooled_sum = total
    ended = [span for span in spans if span.total]
    if not ended:
        return None
    means = [total / span.total for span, total in zip(ended, sums, strict=False)]
    pooled = np.stack(means).astype(np.float32)  # [ended, H]
    return PooledOutput([span.item for span in ended], lambda: pooled)
