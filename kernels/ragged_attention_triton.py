"""Triton kernels of ragged paged attention: one over (tile, KV head, split), and one that merges the splits.

Semantics, tables and launch: ragged_attention.py. A program folds its tile's rows and the G query heads of its KV head
into one M dimension, m = row * G + head, so K and V are read once. Online softmax (Milakov & Gimelshein 2018) in fp32
and base 2; splits along keys as Flash-Decoding (Dao et al. 2023). Invariant: a key that no row of the tile sees is not
read, and a block of keys that a row does not see leaves that row's bits as they were.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ragged_attention_kernel(
    out, partial, stats, q, k_cache, v_cache, tiles, positions, block_tables, split_len, scale_log2,
    q_stride, k_stride, v_stride, table_stride, partial_stride, stats_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, IS_SPLIT: tl.constexpr, IEEE: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, KV heads, splits). WINDOW 0: no window."""
    tile = tiles + tl.program_id(0) * 3
    first = tl.load(tile)
    end = tl.load(tile + 1)
    sequence = tl.load(tile + 2)
    if sequence < 0:
        return
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    begin = 0  # the first key that any row of the tile sees
    if WINDOW > 0:
        begin = tl.maximum(tl.load(positions + first).to(tl.int32) - WINDOW + 1, 0)
    stop = tl.load(positions + end - 1).to(tl.int32) + 1
    lo = begin // ALIGN * ALIGN
    if IS_SPLIT:
        length = tl.load(split_len)
        lo += split * length
        # The last split takes whatever is left, so a split_len that is too small costs time, not correctness.
        stop = tl.where(split < tl.num_programs(2) - 1, tl.minimum(stop, lo + length), stop)
    if lo >= stop:
        return

    m = tl.arange(0, BLOCK_M)
    rows = first + m // GROUP
    row_mask = rows < end
    last_key = tl.load(positions + rows, mask=row_mask, other=0).to(tl.int32)
    rows = rows.to(tl.int64)
    heads = kv_head * GROUP + m % GROUP
    d = tl.arange(0, BLOCK_D)
    q_mask = row_mask[:, None]
    if BLOCK_D != HEAD_DIM:
        q_mask = q_mask & (d < HEAD_DIM)[None, :]
    q_tile = tl.load(q + rows[:, None] * q_stride + (heads * HEAD_DIM)[:, None] + d[None, :], mask=q_mask, other=0.0)

    table = block_tables + sequence.to(tl.int64) * table_stride
    k_base = k_cache + kv_head * HEAD_DIM
    v_base = v_cache + kv_head * HEAD_DIM
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for start in range(lo, stop, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        is_key = n < stop
        if WINDOW > 0:
            is_key = is_key & (n >= begin)
        block = tl.load(table + n // BLOCK_SIZE, mask=is_key, other=0)
        kv_positions = block.to(tl.int64) * BLOCK_SIZE + n % BLOCK_SIZE
        kv_mask = is_key[:, None]
        if BLOCK_D != HEAD_DIM:
            kv_mask = kv_mask & (d < HEAD_DIM)[None, :]
        k = tl.load(k_base + kv_positions[:, None] * k_stride + d[None, :], mask=kv_mask, other=0.0)
        v = tl.load(v_base + kv_positions[:, None] * v_stride + d[None, :], mask=kv_mask, other=0.0)
        if IEEE:
            scores = tl.dot(q_tile, tl.trans(k), input_precision="ieee")
        else:
            scores = tl.dot(q_tile, tl.trans(k))
        visible = is_key[None, :] & (n[None, :] <= last_key[:, None])
        if WINDOW > 0:
            visible = visible & (n[None, :] > (last_key - WINDOW)[:, None])
        scores = tl.where(visible, scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that has seen no key yet
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(weights, axis=1)
        acc = acc * decay[:, None]
        if IEEE:
            acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        else:
            acc = tl.dot(weights.to(v.dtype), v, acc)
        top = new_top

    entry = rows * NUM_HEADS + heads
    if IS_SPLIT:
        target = partial + split.to(tl.int64) * partial_stride + entry[:, None] * HEAD_DIM + d[None, :]
        tl.store(target, acc, mask=q_mask)
        stat = stats + split.to(tl.int64) * stats_stride + entry * 2
        tl.store(stat, top, mask=row_mask)
        tl.store(stat + 1, total, mask=row_mask)
    else:
        acc = acc / total[:, None]
        target = out + entry[:, None] * HEAD_DIM + d[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=q_mask)


@triton.jit(do_not_specialize=["tile_rows"])
def merge_splits_kernel(
    out, partial, stats, tiles, positions, split_len, partial_stride, stats_stride, tile_rows,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, NUM_SPLITS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * tile_rows, query heads): all splits of a row's head at once, summed in one fixed order."""
    tile = tiles + tl.program_id(0) // tile_rows * 3
    first = tl.load(tile)
    end = tl.load(tile + 1)
    row = first + tl.program_id(0) % tile_rows
    if (tl.load(tile + 2) < 0) | (row >= end):
        return
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(tl.load(positions + first).to(tl.int32) - WINDOW + 1, 0)
    num_keys = tl.load(positions + end - 1).to(tl.int32) + 1 - begin // ALIGN * ALIGN
    splits = tl.arange(0, NUM_SPLITS)
    is_used = splits * tl.load(split_len) < num_keys  # the others left nothing in scratch
    entry = row.to(tl.int64) * NUM_HEADS + tl.program_id(1)
    stat = stats + splits.to(tl.int64) * stats_stride + entry * 2
    tops = tl.load(stat, mask=is_used, other=float("-inf"))
    totals = tl.load(stat + 1, mask=is_used, other=0.0)
    weights = tl.exp2(tops - tl.max(tops, axis=0))  # 0 for a split in which the row sees no key
    d = tl.arange(0, BLOCK_D)
    mask = is_used[:, None] & (d < HEAD_DIM)[None, :]
    source = partial + splits.to(tl.int64)[:, None] * partial_stride + entry * HEAD_DIM + d[None, :]
    merged = tl.sum(tl.load(source, mask=mask, other=0.0) * weights[:, None], axis=0)
    merged = merged / tl.sum(totals * weights, axis=0)
    tl.store(out + entry * HEAD_DIM + d, merged.to(out.dtype.element_ty), mask=d < HEAD_DIM)
