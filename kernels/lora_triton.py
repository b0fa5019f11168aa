"""Triton kernels of SGMV and BGMV: shrink (x to h) and expand (h to y), one tile of rows of one adapter a program.

The only file of the two that imports triton, so that the package imports without it; sgmv.py and bgmv.py load it when
they launch. Both walk the same tile routines in the same block order, which is why they give the same bits for a row:
a tile of BGMV has one row, the other 15 are masked. Weights are found through tables of addresses (lora_stack.py), so
adapters keep separate tensors and true ranks, and a captured CUDA graph stays valid while the tables live.

Correct first: block sizes follow from shapes alone and have not been tuned on a GPU. First candidates are a split of K
in shrink, summed in order by expand (few programs at decode), and tf32x3 or larger tiles for long prefills.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_K = 64  # of x and A in shrink; the order of summation depends on it
BLOCK_N = 64  # columns of y a program of expand


@triton.jit
def _shrink_tile(
    h, x, weights, ranks, columns, first, end, slot, module, rank_block, in_size, x_stride, h_stride,
    NUM_MODULES: tl.constexpr, ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h[first:end, columns of the rank block] = x[first:end] @ A^T, in fp32, K ascending."""
    entry = slot * NUM_MODULES + module
    rank = tl.load(ranks + entry)
    if rank_block * BLOCK_R < rank:
        a = tl.load(weights + entry * 2).to(tl.pointer_type(x.dtype.element_ty))  # [R, in]
        if ALIGNED:
            a = tl.multiple_of(a, 16)
        rows = first + tl.arange(0, TILE_ROWS)
        row_mask = rows < end
        rows = rows.to(tl.int64)
        r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
        acc = tl.zeros((TILE_ROWS, BLOCK_R), dtype=tl.float32)
        for k_start in range(0, in_size, BLOCK_K):
            k = k_start + tl.arange(0, BLOCK_K)
            x_tile = tl.load(
                x + rows[:, None] * x_stride + k[None, :], mask=row_mask[:, None] & (k < in_size)[None, :], other=0.0
            )
            a_tile = tl.load(
                a + r[None, :] * in_size + k[:, None], mask=(r < rank)[None, :] & (k < in_size)[:, None], other=0.0
            )
            acc = tl.dot(x_tile, a_tile, acc, input_precision="ieee")
        h_column = tl.load(columns + module * 3)
        tl.store(
            h + rows[:, None] * h_stride + (h_column + r)[None, :], acc, mask=row_mask[:, None] & (r < rank)[None, :]
        )


@triton.jit
def _expand_tile(
    y, h, weights, ranks, scales, columns, first, end, slot, module, column_block, y_stride, h_stride,
    NUM_MODULES: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y[first:end, columns of the block] += scale * h[first:end] @ B^T, in fp32, ranks ascending."""
    entry = slot * NUM_MODULES + module
    rank = tl.load(ranks + entry)
    out_size = tl.load(columns + module * 3 + 2)
    if (rank > 0) & (column_block * BLOCK_N < out_size):
        b = tl.load(weights + entry * 2 + 1).to(tl.pointer_type(DTYPE))  # [out, R]
        if ALIGNED:
            b = tl.multiple_of(b, 16)
        h_column = tl.load(columns + module * 3)
        y_column = tl.load(columns + module * 3 + 1)
        rows = first + tl.arange(0, TILE_ROWS)
        row_mask = rows < end
        rows = rows.to(tl.int64)
        n = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((TILE_ROWS, BLOCK_N), dtype=tl.float32)
        for r_start in range(0, rank, BLOCK_R):
            r = r_start + tl.arange(0, BLOCK_R)
            h_tile = tl.load(
                h + rows[:, None] * h_stride + (h_column + r)[None, :],
                mask=row_mask[:, None] & (r < rank)[None, :], other=0.0,
            )  # fmt: skip
            b_tile = tl.load(
                b + n[None, :] * rank + r[:, None], mask=(n < out_size)[None, :] & (r < rank)[:, None], other=0.0
            )
            # h keeps its fp32 bits: rounding it to B's dtype would cost accuracy and save little, R is small.
            acc = tl.dot(h_tile, b_tile.to(tl.float32), acc, input_precision="ieee")
        mask = row_mask[:, None] & (n < out_size)[None, :]
        target = y + rows[:, None] * y_stride + (y_column + n)[None, :]
        total = tl.load(target, mask=mask, other=0.0).to(tl.float32) + acc * tl.load(scales + entry)
        tl.store(target, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def sgmv_shrink(
    h, x, weights, ranks, columns, tiles, in_size, x_stride, h_stride,
    NUM_MODULES: tl.constexpr, ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, modules, rank blocks)."""
    tile = tiles + tl.program_id(0) * 3
    _shrink_tile(
        h, x, weights, ranks, columns, tl.load(tile), tl.load(tile + 1), tl.load(tile + 2),
        tl.program_id(1), tl.program_id(2), in_size, x_stride, h_stride,
        NUM_MODULES, ALIGNED, TILE_ROWS, BLOCK_R, BLOCK_K,
    )  # fmt: skip


@triton.jit
def sgmv_expand(
    y, h, weights, ranks, scales, columns, tiles, y_stride, h_stride,
    NUM_MODULES: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, modules, column blocks)."""
    tile = tiles + tl.program_id(0) * 3
    _expand_tile(
        y, h, weights, ranks, scales, columns, tl.load(tile), tl.load(tile + 1), tl.load(tile + 2),
        tl.program_id(1), tl.program_id(2), y_stride, h_stride,
        NUM_MODULES, ALIGNED, DTYPE, TILE_ROWS, BLOCK_R, BLOCK_N,
    )  # fmt: skip


@triton.jit
def bgmv_shrink(
    h, x, weights, ranks, columns, row_slots, in_size, x_stride, h_stride,
    NUM_MODULES: tl.constexpr, ALIGNED: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (rows, modules, rank blocks); a row without adapter leaves at once."""
    row = tl.program_id(0)
    slot = tl.load(row_slots + row)
    if slot >= 0:
        _shrink_tile(
            h, x, weights, ranks, columns, row, row + 1, slot,
            tl.program_id(1), tl.program_id(2), in_size, x_stride, h_stride,
            NUM_MODULES, ALIGNED, TILE_ROWS, BLOCK_R, BLOCK_K,
        )  # fmt: skip


@triton.jit
def bgmv_expand(
    y, h, weights, ranks, scales, columns, row_slots, y_stride, h_stride,
    NUM_MODULES: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (rows, modules, column blocks); a row without adapter leaves at once."""
    row = tl.program_id(0)
    slot = tl.load(row_slots + row)
    if slot >= 0:
        _expand_tile(
            y, h, weights, ranks, scales, columns, row, row + 1, slot,
            tl.program_id(1), tl.program_id(2), y_stride, h_stride,
            NUM_MODULES, ALIGNED, DTYPE, TILE_ROWS, BLOCK_R, BLOCK_N,
        )  # fmt: skip
