"""Attention as it was until 2026-11-28 (commit 76f7127), for `attention_kernels.py` to time beside today's on a card.

Its products waited for one another, its keys and values were waited for as soon as they were asked for, every block was
masked, and splits were always joined by a launch of their own: docs/log.md, 2026-11-28. Nothing else uses it, and it
goes once a card has said which is faster. Semantics: specserve/kernels/ragged_attention.py, whose bits differ.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from specserve.kernels.ragged_attention import BLOCK_N, MAX_SPLITS

_READ_AHEAD = tl.constexpr(8)  # splits that are read together, so that one does not wait for the other
_ONE = tl.constexpr(0x3F800000)  # the bits of 1.0


@triton.jit
def _shifted(top):
    """What to subtract before exp2: the maximum so far, 0 where no key was seen yet."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _sum_of_weights(weights):
    """Of weights from 0 to 1, each to 2^-23, in any order: behind a leading 1 their bits are whole numbers.

    Up to 128 of them fit 31 bits.
    """
    units = (weights + 1.0).to(tl.int32, bitcast=True) - _ONE
    return tl.sum(units, axis=1).to(tl.float32) * 2.0**-23


@triton.jit
def _dot(a, b, acc, IEEE: tl.constexpr):
    if IEEE:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def ragged_attention_kernel(
    out, partial, stats, q, k_cache, v_cache, tiles, positions, block_tables, scale_log2,
    q_stride, k_stride, v_stride, table_stride, partial_stride, stats_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SPLIT_LEN: tl.constexpr, IS_SHARED: tl.constexpr, IEEE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, KV heads, programs): program i has the tile's splits i, i + programs, ... WINDOW 0: no window."""
    tile = tiles + tl.program_id(0) * 3
    first = tl.load(tile)
    end = tl.load(tile + 1)
    sequence = tl.load(tile + 2)
    if sequence < 0:
        return
    kv_head = tl.program_id(1)
    begin = 0  # the first key that any row of the tile sees
    if WINDOW > 0:
        begin = tl.maximum(tl.load(positions + first).to(tl.int32) - WINDOW + 1, 0)
    stop = tl.load(positions + end - 1).to(tl.int32) + 1
    first_split = begin // SPLIT_LEN
    last_split = (stop - 1) // SPLIT_LEN
    split = first_split
    step = 1
    if IS_SHARED:
        split += tl.program_id(2)
        step = tl.num_programs(2)
    if split > last_split:
        return
    BLOCKS: tl.constexpr = SPLIT_LEN // BLOCK_N  # of a split
    num_splits = (last_split - split) // step + 1  # of this program
    newest = split + (num_splits - 1) * step
    of_newest = tl.minimum(BLOCKS, (stop - newest * SPLIT_LEN + BLOCK_N - 1) // BLOCK_N)
    num_blocks = (num_splits - 1) * BLOCKS + of_newest

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
    entry = rows * NUM_HEADS + heads

    table = block_tables + sequence.to(tl.int64) * table_stride
    k_base = k_cache + kv_head * HEAD_DIM
    v_base = v_cache + kv_head * HEAD_DIM
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    joined_top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    joined_total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    joined = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    for block_idx in range(0, num_blocks):
        start = (split + block_idx // BLOCKS * step) * SPLIT_LEN + block_idx % BLOCKS * BLOCK_N
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
        scores = _dot(q_tile, tl.trans(k), None, IEEE)
        visible = is_key[None, :] & (n[None, :] <= last_key[:, None])
        if WINDOW > 0:
            visible = visible & (n[None, :] > (last_key - WINDOW)[:, None])
        scores = tl.where(visible, scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shift = _shifted(new_top)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(top - shift)
        total = tl.fma(total, decay, _sum_of_weights(weights))
        acc = _dot(weights.to(v.dtype), v, acc * decay[:, None], IEEE)
        top = new_top
        if (block_idx % BLOCKS == BLOCKS - 1) | (block_idx == num_blocks - 1):  # a split is done
            if IS_SHARED:
                at = (start // SPLIT_LEN - first_split).to(tl.int64)
                target = partial + at * partial_stride + entry[:, None] * HEAD_DIM + d[None, :]
                tl.store(target, acc, mask=q_mask)
                stat = stats + at * stats_stride + entry * 2
                tl.store(stat, top, mask=row_mask)
                tl.store(stat + 1, total, mask=row_mask)
            else:
                new_top = tl.maximum(joined_top, top)
                shift = _shifted(new_top)
                before, now = tl.exp2(joined_top - shift), tl.exp2(top - shift)
                joined = tl.fma(joined, tl.broadcast_to(before[:, None], joined.shape), acc * now[:, None])
                joined_total = tl.fma(joined_total, before, total * now)
                joined_top = new_top
            top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
            total = tl.zeros((BLOCK_M,), dtype=tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)

    if not IS_SHARED:
        target = out + entry[:, None] * HEAD_DIM + d[None, :]
        tl.store(target, (joined / joined_total[:, None]).to(out.dtype.element_ty), mask=q_mask)


@triton.jit(do_not_specialize=["tile_rows"])
def join_splits_kernel(
    out, partial, stats, tiles, positions, partial_stride, stats_stride, tile_rows,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, SPLIT_LEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * tile_rows, query heads): the splits of a row's head in ascending order."""
    tile = tiles + tl.program_id(0) // tile_rows * 3
    first = tl.load(tile)
    end = tl.load(tile + 1)
    row = first + tl.program_id(0) % tile_rows
    if (tl.load(tile + 2) < 0) | (row >= end):
        return
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(tl.load(positions + first).to(tl.int32) - WINDOW + 1, 0)
    num_splits = tl.load(positions + end - 1).to(tl.int32) // SPLIT_LEN - begin // SPLIT_LEN + 1
    entry = row.to(tl.int64) * NUM_HEADS + tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    mask = d < HEAD_DIM
    first_only = tl.arange(0, 1)
    top = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    joined = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, num_splits, _READ_AHEAD):
        for ahead in tl.static_range(_READ_AHEAD):
            split = (start + ahead + first_only).to(tl.int64)
            is_used = split < num_splits  # the others left nothing in scratch
            stat = stats + split * stats_stride + entry * 2
            its_top = tl.load(stat, mask=is_used, other=float("-inf"))
            its_total = tl.load(stat + 1, mask=is_used, other=0.0)
            source = partial + split * partial_stride + entry * HEAD_DIM + d
            part = tl.load(source, mask=mask & is_used, other=0.0)
            new_top = tl.maximum(top, its_top)
            shift = _shifted(new_top)
            before, now = tl.exp2(top - shift), tl.exp2(its_top - shift)
            joined = tl.fma(joined, tl.broadcast_to(before, joined.shape), part * now)
            total = tl.fma(total, before, its_total * now)
            top = new_top
    tl.store(out + entry * HEAD_DIM + d, (joined / total).to(out.dtype.element_ty), mask=mask)


def programs_before(num_tiles: int, num_kv_heads: int, num_sms: int, row_bytes: int, num_rows: int) -> int:
    """Programs that share a tile's splits: `choose_programs` of then."""
    if num_rows * row_bytes > 1 << 26:
        return 1
    return min(MAX_SPLITS, triton.next_power_of_2(math.ceil(2 * num_sms / max(1, num_tiles * num_kv_heads))))


def attention_before_(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tiles: torch.Tensor,
    positions: torch.Tensor,
    block_tables: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor] | None,
    arrived: torch.Tensor | None = None,
    *,
    block_size: int,
    scale: float,
    window: int | None,
    split_len: int,
    num_programs: int,
    tile_rows: int,
) -> None:
    """`ragged_attention_` of then, bf16 only."""
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[2], k_cache.shape[1]
    group = num_heads // num_kv_heads
    block_m = max(16, triton.next_power_of_2(tile_rows * group))
    block_d = max(16, triton.next_power_of_2(head_dim))
    partial, stats = scratch or (out, out)
    shape = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "WINDOW": window or 0, "SPLIT_LEN": split_len}
    ragged_attention_kernel[(tiles.shape[0], num_kv_heads, num_programs)](
        out, partial, stats, q, k_cache, v_cache, tiles, positions, block_tables, scale * math.log2(math.e),
        q.stride(0), k_cache.stride(0), v_cache.stride(0), block_tables.stride(0), partial.stride(0), stats.stride(0),
        GROUP=group, BLOCK_SIZE=block_size, IEEE=False, IS_SHARED=num_programs > 1,
        BLOCK_M=block_m, BLOCK_N=BLOCK_N[block_d * 2], BLOCK_D=block_d,
        num_warps=8 if block_m == 128 else 4, num_stages=5 if block_m < 64 else 3,
        **shape,
    )  # fmt: skip
    if num_programs > 1:
        join_splits_kernel[(tiles.shape[0] * tile_rows, num_heads)](
            out, partial, stats, tiles, positions, partial.stride(0), stats.stride(0), tile_rows,
            BLOCK_D=block_d, num_warps=1, **shape,
        )  # fmt: skip
