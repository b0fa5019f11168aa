"""The Triton kernel of linear layers with one order of sums: one program a tile of outputs. Semantics: linear_rows.py.

Weights are the left operand, so that their 64 or 128 rows fill a tensor core's instruction however few rows x has.
Both come by TMA, which gives zeros beyond the edges; a sum takes them without a change. Weights of 8 bits become x's
dtype on their way into the tensor cores, which changes no value, and their scales multiply the finished sums
(scaled_weights.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["num_rows"])
def linear_rows_kernel(
    y, x, weight, scales, bias, num_rows, out_size, in_size,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of ROWS rows, tiles of COLUMNS outputs): those that share weights run at the same time.

    x and weight are descriptors of blocks [ROWS, BLOCK_K], [COLUMNS, BLOCK_K].
    """
    if IS_DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    first_row, first = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    sums = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
    for k in range(0, in_size, BLOCK_K):
        w = weight.load([first, k])
        if HAS_SCALES:
            w = w.to(tl.float32).to(y.dtype.element_ty)  # by way of fp32 for the interpreter; the binary is the same
        sums = tl.dot(w, x.load([first_row, k]).T, sums)
    rows, columns = first_row + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    if HAS_SCALES:
        sums *= tl.load(scales + columns, mask=columns < out_size, other=0.0)[:, None]
    value = tl.trans(sums).to(y.dtype.element_ty)
    if HAS_BIAS:
        offset = tl.load(bias + columns, mask=columns < out_size, other=0.0).to(tl.float32)
        value = (value.to(tl.float32) + offset[None, :]).to(y.dtype.element_ty)
    place = rows[:, None].to(tl.int64) * out_size + columns[None, :]
    tl.store(y + place, value, mask=(rows < num_rows)[:, None] & (columns < out_size)[None, :])
