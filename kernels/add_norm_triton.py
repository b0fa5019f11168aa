"""The Triton kernel of residual addition and RMS norm: one program a row. Semantics and launch: add_norm.py.

A row of one block stays in registers between the addition and the norm. A longer row is summed block by block and read
a second time to be normed; nothing that the program wrote is read back, so no barrier is needed.

The order in which a row's squares are added is written out (`sum_of_columns`), for linear_fused_triton.py norms rows
in tiles of another layout, and a row has the same bits by both.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_MOST_HALVINGS = tl.constexpr(14)  # of 16384 columns


@triton.jit
def sum_of_columns(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """[ROWS] of x [ROWS, SIZE], SIZE a power of two: column c and c + SIZE / 2 are added, and again, until one is left.

    `tl.sum` of more than two values adds them as the layout has them.
    """
    for halving in tl.static_range(_MOST_HALVINGS):
        if SIZE >> halving > 1:
            x = tl.sum(tl.reshape(x, (ROWS, 2, SIZE >> (halving + 1))), axis=1)
    return tl.reshape(x, (ROWS,))


@triton.jit
def rms_scale(squares, hidden, eps, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """[ROWS] that rows are multiplied by, of their squared columns [ROWS, SIZE], zero beyond `hidden`."""
    return tl.rsqrt(sum_of_columns(squares, ROWS, SIZE) / hidden + eps)


@triton.jit
def _total(
    residual, h, post_weight, columns, mask, post_scale,
    HAS_H: tl.constexpr, HAS_POST: tl.constexpr,
):  # fmt: skip
    """residual + h of some columns in fp32, rounded as the residual is stored."""
    x = tl.load(residual + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_H:
        added = tl.load(h + columns, mask=mask, other=0.0).to(tl.float32)
        if HAS_POST:
            added = added * post_scale * tl.load(post_weight + columns, mask=mask, other=0.0).to(tl.float32)
        x = (x + added).to(residual.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def add_rms_norm_kernel(
    out, residual, h, weight, post_weight, hidden, eps, out_stride, residual_stride, h_stride,
    HAS_H: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_POST: tl.constexpr, BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (rows of out,)."""
    if IS_DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    residual += row * residual_stride
    h += row * h_stride
    out += row * out_stride
    columns = tl.arange(0, BLOCK)

    post_scale = 1.0
    if HAS_POST:
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        for block in range(NUM_BLOCKS):
            c = block * BLOCK + columns
            value = tl.load(h + c, mask=c < hidden, other=0.0).to(tl.float32)
            squares += value * value
        post_scale = rms_scale(squares, hidden, eps, 1, BLOCK)

    if NUM_BLOCKS == 1:
        mask = columns < hidden
        x = _total(residual, h, post_weight, columns, mask, post_scale, HAS_H, HAS_POST)
        if HAS_H:
            tl.store(residual + columns, x.to(residual.dtype.element_ty), mask=mask)
        if HAS_WEIGHT:
            scale = rms_scale(x * x, hidden, eps, 1, BLOCK)
            x = x * scale * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + columns, x.to(out.dtype.element_ty), mask=mask)
    else:
        scale = 1.0
        if HAS_WEIGHT:
            squares = tl.zeros((BLOCK,), dtype=tl.float32)
            for block in range(NUM_BLOCKS):
                c = block * BLOCK + columns
                x = _total(residual, h, post_weight, c, c < hidden, post_scale, HAS_H, HAS_POST)
                squares += x * x
            scale = rms_scale(squares, hidden, eps, 1, BLOCK)
        for block in range(NUM_BLOCKS):
            c = block * BLOCK + columns
            mask = c < hidden
            x = _total(residual, h, post_weight, c, mask, post_scale, HAS_H, HAS_POST)
            if HAS_H:
                tl.store(residual + c, x.to(residual.dtype.element_ty), mask=mask)
            if HAS_WEIGHT:
                x = x * scale * tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
            tl.store(out + c, x.to(out.dtype.element_ty), mask=mask)
