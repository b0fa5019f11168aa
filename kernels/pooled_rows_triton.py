"""Triton kernel of pooling: a program for each span and block of columns. pooled_rows.py states what it computes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pool_rows(
    out,
    sums,
    hidden,
    spans,
    totals,
    hidden_size,
    out_stride,
    sums_stride,
    hidden_stride,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Grid (spans, column blocks)."""
    span = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < hidden_size
    first_row = tl.load(spans + span * 6).to(tl.int64)
    num_rows = tl.load(spans + span * 6 + 1)
    end_row = first_row + num_rows
    position = tl.load(spans + span * 6 + 2)
    seat = tl.load(spans + span * 6 + 3).to(tl.int64)
    goes_on = tl.load(spans + span * 6 + 4)
    is_weighted = tl.load(spans + span * 6 + 5)
    carried = sums + seat * sums_stride + columns
    total = tl.load(carried, mask=columns < tl.where(goes_on != 0, hidden_size, 0), other=0.0)
    for start in range(0, num_rows, UNROLL):
        for idx in tl.static_range(UNROLL):  # all loads of a round are under way before the first sum
            row = first_row + start + idx
            num_columns = tl.where(row < end_row, hidden_size, 0)
            values = tl.load(hidden + row * hidden_stride + columns, mask=columns < num_columns, other=0.0)
            weight = tl.where(is_weighted != 0, row - first_row + position + 1, 1)
            total += values.to(tl.float64) * weight.to(tl.float64)
    tl.store(carried, total, mask=is_column)
    weights = tl.load(totals + span)
    if weights != 0.0:
        tl.store(out + span * out_stride + columns, (total / weights).to(tl.float32), mask=is_column)
