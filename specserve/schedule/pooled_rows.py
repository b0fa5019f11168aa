"""Which rows of a step are pooled, and whose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .scheduler import ScheduledSequence


class PooledSpan(NamedTuple):
    """Rows of one sequence, one after the other, whose hidden states are added up.

    Row first_row + i, at position + i of the text, counts position + i + 1 times where it `is_weighted`, else once.
    """

    item: ScheduledSequence
    first_row: int  # of the step
    num_rows: int
    position: int
    goes_on: bool  # from rows of earlier steps
    total: int  # weights of all rows of the text; 0 where some are still to come
    is_weighted: bool


def pooled_spans(items: Sequence[ScheduledSequence], counts: Sequence[int]) -> list[PooledSpan]:
    """Of `items`, whose rows, `counts` each, stand in the step one after the other; those that end first."""
    spans, row = [], 0
    for item, count in zip(items, counts, strict=True):
        first_row, row = row, row + count
        if item.seq.pooling is not None and (span := _span(item, first_row)) is not None:
            spans.append(span)
    return sorted(spans, key=lambda span: not span.total)


def _span(item: ScheduledSequence, first_row: int) -> PooledSpan | None:
    seq, num_rows = item.seq, item.num_rows
    start, num_tokens = seq.num_computed, len(seq.tokens)
    is_end = start + num_rows == num_tokens
    if seq.pooling == "last":
        return PooledSpan(item, first_row + num_rows - 1, 1, num_tokens - 1, False, 1, False) if is_end else None
    is_weighted = seq.pooling == "weighted_mean"
    weights = num_tokens * (num_tokens + 1) // 2 if is_weighted else num_tokens
    return PooledSpan(item, first_row, num_rows, start, start > 0, weights if is_end else 0, is_weighted)
