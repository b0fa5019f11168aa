"""Triton kernels of LoRA over tiles: shrink (x to h) and expand (h to y), one tile of one adapter's rows a program.

The kernels of lora_tiles.py, which launches them and chooses their sizes. A row's sums have one order, which
follows from the shapes and its adapter's rank: neither its place in a tile nor the other rows change its bits. Weights
are found through records (lora_tables.py). h is [T, modules, rank blocks, splits, 16] fp32, so that one rank block of
a row is one piece of memory over all splits. Grids follow from capacities; programs without work leave at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lora_shrink(
    h, x, records, tiles, slot_stride, in_size, x_stride, num_rank_blocks,
    NUM_MODULES: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h[rows, module, :, split] = x[rows, chunk] @ A[:, chunk]^T, K ascending. Grid (tiles, modules x splits)."""
    tile = tiles + tl.program_id(0) * 3
    slot = tl.load(tile + 2)
    if slot < 0:
        return
    module = tl.program_id(1) % NUM_MODULES
    split = tl.program_id(1) // NUM_MODULES
    record = records + slot.to(tl.int64) * slot_stride + module * 4
    rank = tl.load(record + 2).to(tl.int32)
    if rank == 0:
        return
    a = tl.multiple_of(tl.load(record).to(tl.pointer_type(x.dtype.element_ty)), 16)  # [R, in]
    rows = tl.load(tile) + tl.arange(0, TILE_ROWS)
    row_mask = rows < tl.load(tile + 1)
    rows = rows.to(tl.int64)
    x_rows = x + rows[:, None] * x_stride
    h_rows = h + ((rows * NUM_MODULES + module) * num_rank_blocks * SPLITS + split)[:, None] * BLOCK_R
    steps: tl.constexpr = CHUNK // BLOCK_K
    acc = tl.zeros((TILE_ROWS, BLOCK_R), dtype=tl.float32)
    # One loop over rank blocks and K, so that its loads are prefetched across rank blocks too.
    for step in range(0, tl.cdiv(rank, BLOCK_R) * steps):
        rank_block, k_block = step // steps, step % steps
        k = split * CHUNK + k_block * BLOCK_K + tl.arange(0, BLOCK_K)
        r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
        k_mask = (k < in_size)[None, :]
        x_tile = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & k_mask, other=0.0)  # [TILE_ROWS, BLOCK_K]
        a_tile = tl.load(
            a + r.to(tl.int64)[:, None] * in_size + k[None, :], mask=(r < rank)[:, None] & k_mask, other=0.0
        )  # [BLOCK_R, BLOCK_K]
        acc = tl.where(k_block == 0, 0.0, acc)
        acc = tl.dot(x_tile, tl.trans(a_tile), acc, input_precision="ieee")
        if k_block == steps - 1:
            target = h_rows + rank_block * SPLITS * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
            tl.store(target, acc, mask=row_mask[:, None])


@triton.jit
def lora_gather(
    h, tokens, records, tiles, slot_stride, vocab_size, num_rank_blocks,
    DTYPE: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h[row, 0, :, 0] = A[:, tokens[row]]: the shrink of an embedding, whose x is one-hot. Grid (tiles,)."""
    tile = tiles + tl.program_id(0) * 3
    slot = tl.load(tile + 2)
    if slot < 0:
        return
    record = records + slot.to(tl.int64) * slot_stride
    rank = tl.load(record + 2).to(tl.int32)
    if rank == 0:
        return
    a = tl.load(record).to(tl.pointer_type(DTYPE))  # [R, V]
    rows = tl.load(tile) + tl.arange(0, TILE_ROWS)
    row_mask = rows < tl.load(tile + 1)
    token = tl.load(tokens + rows, mask=row_mask, other=-1)
    is_token = (token >= 0) & (token < vocab_size)  # else h is 0: nothing outside A is read
    h_rows = h + (rows.to(tl.int64) * num_rank_blocks)[:, None] * BLOCK_R
    for rank_block in range(0, tl.cdiv(rank, BLOCK_R)):
        r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
        values = tl.load(
            a + r.to(tl.int64)[None, :] * vocab_size + token[:, None],
            mask=is_token[:, None] & (r < rank)[None, :], other=0.0,
        )  # fmt: skip
        target = h_rows + rank_block * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        tl.store(target, values.to(tl.float32), mask=row_mask[:, None])


@triton.jit
def lora_expand(
    y, h, records, tiles, slot_stride, y_stride, num_rank_blocks, out_0, out_1, out_2,
    NUM_MODULES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, DTYPE: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, COLUMN_BLOCKS: tl.constexpr,
):  # fmt: skip
    """y[rows, block] += scale * (h summed over splits) @ B[block]^T. Grid (tiles, pieces of columns)."""
    tile = tiles + tl.program_id(0) * 3
    slot = tl.load(tile + 2)
    if slot < 0:
        return
    # Which module this piece of columns is of: modules stand side by side, their last pieces may be short.
    PIECE: tl.constexpr = BLOCK_N * COLUMN_BLOCKS
    module = 0
    column = 0
    out_size = out_0
    piece = tl.program_id(1)
    if NUM_MODULES > 1:
        end_0 = tl.cdiv(out_0, PIECE)
        is_later = piece >= end_0
        first = tl.where(is_later, end_0, 0)
        module = tl.where(is_later, 1, module)
        column = tl.where(is_later, out_0, column)
        out_size = tl.where(is_later, out_1, out_size)
        if NUM_MODULES > 2:
            end_1 = end_0 + tl.cdiv(out_1, PIECE)
            is_last = piece >= end_1
            first = tl.where(is_last, end_1, first)
            module = tl.where(is_last, 2, module)
            column = tl.where(is_last, out_0 + out_1, column)
            out_size = tl.where(is_last, out_2, out_size)
        piece = piece - first
    record = records + slot.to(tl.int64) * slot_stride + module * 4
    rank = tl.load(record + 2).to(tl.int32)
    if rank == 0:
        return
    b = tl.multiple_of(tl.load(record + 1).to(tl.pointer_type(DTYPE)), 16)  # [out, R rounded up to 8]
    b_stride = tl.cdiv(rank, 8) * 8
    scale = tl.load(record + 3).to(tl.int32).to(tl.float32, bitcast=True)
    end = tl.load(tile + 1)
    rows = (tl.load(tile) + tl.arange(0, TILE_ROWS)).to(tl.int64)
    y_rows = y + rows[:, None] * y_stride + column
    h_rows = h + ((rows * NUM_MODULES + module) * num_rank_blocks * SPLITS)[:, None, None] * BLOCK_R
    splits = tl.arange(0, BLOCK_SPLITS)
    ranks = tl.cdiv(rank, BLOCK_R)
    num_blocks = tl.minimum(COLUMN_BLOCKS, tl.cdiv(out_size - piece * PIECE, BLOCK_N))
    total = tl.zeros((TILE_ROWS, BLOCK_R), dtype=tl.float32)
    acc = tl.zeros((TILE_ROWS, BLOCK_N), dtype=tl.float32)
    # One loop over columns and rank blocks, so that B is prefetched across blocks of columns too.
    for step in range(0, num_blocks * ranks):
        column_block = step // ranks
        rank_block = step - column_block * ranks
        is_end = rank_block == ranks - 1
        n = piece * PIECE + column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        n_mask = n < out_size
        y_mask = (rows < tl.where(is_end, end, 0))[:, None] & n_mask[None, :]
        old = tl.load(y_rows + n[None, :], mask=y_mask, other=0.0)  # early: its latency passes during the products
        r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
        b_tile = tl.load(
            b + n.to(tl.int64)[:, None] * b_stride + r[None, :],
            mask=n_mask[:, None] & (r < b_stride)[None, :], other=0.0,
        )  # [BLOCK_N, BLOCK_R]  # fmt: skip
        # All 16 ranks of a block, which vectorises: beyond the rank shrink wrote products with zeros. One block's h
        # serves all columns.
        is_new = (step == 0) | (ranks > 1)
        h_block = (
            h_rows + (rank_block * SPLITS + splits)[None, :, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, None, :]
        )
        h_mask = (rows < tl.where(is_new, end, 0))[:, None, None] & (splits < SPLITS)[None, :, None]
        parts = tl.load(h_block, mask=h_mask, other=0.0)  # [TILE_ROWS, splits, BLOCK_R]
        total = tl.where(is_new, tl.sum(parts, 1), total)
        acc = tl.where(rank_block == 0, 0.0, acc)
        acc = _dot_fp32(total, tl.trans(b_tile), acc)
        if is_end:
            result = old.to(tl.float32) + acc * scale
            tl.store(y_rows + n[None, :], result.to(y.dtype.element_ty), mask=y_mask)


@triton.jit
def _dot_fp32(total, b, acc):
    """acc + total @ b to about fp32's accuracy, on tensor cores where b has 16 bits: total goes in as parts."""
    if b.dtype == tl.bfloat16:
        high = total.to(tl.bfloat16)  # 3 x 8 bits of mantissa
        rest = total - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(high, b, acc)
        acc = tl.dot(middle, b, acc)
        acc = tl.dot(low, b, acc)
    elif b.dtype == tl.float16:
        # fp16 parts would overflow beyond 65504; tf32 holds fp16's b exactly and has fp32's range, 2 x 11 bits.
        b = b.to(tl.float32)
        high = (total.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        acc = tl.dot(high, b, acc, input_precision="tf32")
        acc = tl.dot(total - high, b, acc, input_precision="tf32")
    else:
        acc = tl.dot(total, b, acc, input_precision="ieee")
    return acc
