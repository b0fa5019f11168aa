"""Sums of hidden states over the rows of a text, for embeddings and classification, carried from step to step.

Semantics, for span p of rows f .. f+n-1 of hidden [T, H], at positions i .. i+n-1 of its text:
    sum[p] = carry[p] + w(i) * hidden[f] + w(i+1) * hidden[f+1] + ...,  in that order, in float64
    w(j) = j + 1 where the span is weighted ("SGPT", Muennighoff 2022), else 1
    out[p] = sum[p] / total[p], rounded to float32, where total[p] is not 0
One order, row after row, so that the sum has the same bits however a text was cut into steps.
"""

from __future__ import annotations

import numpy as np
import torch

UNROLL = 8  # rows that are loaded together
MAX_BLOCK = 128  # columns of one program


def sum_rows(rows: np.ndarray, position: int, is_weighted: bool, carry: np.ndarray | None) -> np.ndarray:
    """The definition, and the CPU path: sum [H] float64 of `rows` [n, H] float32 and `carry` [H] float64, if any."""
    total = np.zeros(rows.shape[1]) if carry is None else carry.copy()
    wide = rows.astype(np.float64)
    if is_weighted:
        wide *= np.arange(position + 1, position + 1 + len(rows))[:, None]  # exact in float64
    for row in wide:  # a microsecond each: np.add.reduce promises no order
        total += row
    return total


def pool_rows_(
    out: torch.Tensor,
    sums: torch.Tensor,
    hidden: torch.Tensor,
    spans: torch.Tensor,
    totals: torch.Tensor,
) -> None:
    """On a device: add spans of `hidden` [T, H] to `sums` [seats, H] float64, and write `out` [P, H] float32.

    `spans` is [P, 6] int32: first row, number of rows, position, seat, whether it goes on from what `sums` holds,
    whether it is weighted. `totals` is [P] float64; where it is 0 the row of `out` is not written. No two spans have
    one seat. CPU tensors work under Triton's interpreter, for tests.
    """
    num_spans, hidden_size = spans.shape[0], hidden.shape[1]
    assert spans.dtype == torch.int32 and spans.shape == (num_spans, 6), (spans.dtype, spans.shape)
    assert totals.dtype == sums.dtype == torch.float64 and totals.shape == (num_spans,), (totals.dtype, totals.shape)
    assert out.dtype == torch.float32 and out.shape[0] >= num_spans, (out.dtype, out.shape)
    assert all(tensor.stride(-1) == 1 for tensor in (out, sums, hidden, spans))
    if not num_spans:
        return
    import triton

    from .pooled_rows_triton import pool_rows

    block = min(MAX_BLOCK, triton.next_power_of_2(hidden_size))
    pool_rows[(num_spans, triton.cdiv(hidden_size, block))](
        out,
        sums,
        hidden,
        spans,
        totals,
        hidden_size,
        out.stride(0),
        sums.stride(0),
        hidden.stride(0),
        BLOCK=block,
        UNROLL=UNROLL,
    )
