"""Triton kernels of ragged paged attention: one over (KV head, tile, program), one that joins splits of large tiles.

Semantics, tables and launch: ragged_attention.py. A program folds its tile's rows and the G query heads of its KV head
into one M dimension, m = row * G + head, so K and V are read once. Online softmax (Milakov & Gimelshein 2018) in fp32
and base 2 within a split; splits along keys as Flash-Decoding (Dao et al. 2023), but of fixed ranges of keys.

Invariants: a key that no row of the tile sees is not read, and a block or split of keys that a row does not see leaves
that row's bits as they were. No sum of a row follows the tile's size: products are sums over k in the matrix unit, a
block's weights are added as whole numbers (a reduction's order follows the layout), and splits are joined by explicit
multiply-adds, the same wherever they are joined.

What the compiler makes of the loop hangs on its form. The blocks' numbers are read a block ahead, so that K and V hang
on no load of their own iteration and are fetched several blocks ahead. A split's end is dealt with where the next one
begins, behind the product with K: whatever touched the sums behind the product with V would make it wait, and every
other product with it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_READ_AHEAD = tl.constexpr(8)  # splits that are read together, so that one does not wait for the other
_ONE = tl.constexpr(0x3F800000)  # the bits of 1.0


@triton.jit
def _shifted(top):
    """What to subtract before exp2: the maximum so far, 0 where no key was seen yet."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _scaled(x, factor, offset):
    """x * factor + offset by one rounding; [M, N], and what can be broadcast to it."""
    return tl.fma(x, tl.broadcast_to(factor, x.shape), tl.broadcast_to(offset, x.shape))


@triton.jit
def _sum_of_weights(weights):
    """Of weights from 0 to 1, each to 2^-23, in any order: behind a leading 1 their bits are whole numbers.

    Up to 128 of them fit 31 bits. A weight that rounding took above 1 counts half of what it is above.
    """
    units = (weights + 1.0).to(tl.int32, bitcast=True) - _ONE
    return tl.sum(units, axis=1).to(tl.float32) * 2.0**-23


@triton.jit
def _joined(joined, joined_top, joined_total, acc, top, total):
    """A row's splits so far, and the next: sums [M, D], maxima and totals [M]."""
    new_top = tl.maximum(joined_top, top)
    shift = _shifted(new_top)
    before, now = tl.exp2(joined_top - shift), tl.exp2(top - shift)
    joined = _scaled(joined, before[:, None], acc * now[:, None])
    return joined, new_top, tl.fma(joined_total, before, total * now)


@triton.jit
def _store_split(
    partial, stats, at, partial_stride, stats_stride, place, entry, acc, top, total, q_mask, row_mask
):  # fmt: skip
    """A split's sums, maxima and totals to the scratch of the split `at` of its tile."""
    at = at.to(tl.int64)
    tl.store(partial + at * partial_stride + place, acc, mask=q_mask)
    stats += at * stats_stride
    tl.store(stats + entry * 2, top, mask=row_mask)
    tl.store(stats + entry * 2 + 1, total, mask=row_mask)


@triton.jit
def _capped(scores, to_exponent):
    """tanh(x) of scores [M, N], whose product with `to_exponent` is log2(e^2x)."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(scores * to_exponent))


@triton.jit
def _dot(a, b, acc, IEEE: tl.constexpr):
    if IEEE:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def ragged_attention_kernel(
    out, partial, stats, arrived, q, k_cache, v_cache, tiles, positions, block_tables, scale_log2,
    cap_exponent, q_stride, kv_stride, table_stride, partial_stride, stats_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SPLIT_LEN: tl.constexpr, IS_WIDE: tl.constexpr, IS_SHARED: tl.constexpr, JOINS: tl.constexpr,
    HAS_CAP: tl.constexpr, IEEE: tl.constexpr, IS_DEPENDENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (KV heads, tiles, programs): program i has the tile's splits i, i + programs, ... WINDOW 0: no window.

    IS_WIDE: a cache has places beyond 31 bits. HAS_CAP: what `scale_log2` multiplies is tanh of the scores. JOINS: the
    last program of a tile to arrive joins its splits; the number of those who did, in `arrived` [tiles, KV heads], is 0
    before and after.
    """
    if IS_DEPENDENT:
        gdc_launch_dependents()
    tile_idx = tl.num_programs(1) - 1 - tl.program_id(1)  # a prompt's last tiles have most keys: they go first
    tile = tiles + tile_idx * 3
    first = tl.load(tile)
    end = tl.load(tile + 1)
    sequence = tl.load(tile + 2)
    if (sequence < 0) | (first >= end):  # asks for all three, or the others would be loaded behind the first
        if IS_DEPENDENT:
            gdc_wait()
        return
    kv_head = tl.program_id(0)
    whole = tl.load(positions + first).to(tl.int32) + 1  # keys that every row of the tile sees, without a window
    stop = tl.load(positions + end - 1).to(tl.int32) + 1
    begin = 0  # the first key that any row of the tile sees
    if WINDOW > 0:
        begin = tl.maximum(whole - WINDOW, 0)
    first_split = begin // SPLIT_LEN
    split = first_split
    step = 1
    if IS_SHARED:
        split += tl.program_id(2)
        step = tl.num_programs(2)
    table = block_tables + sequence.to(tl.int64) * table_stride
    entry_idx = split * SPLIT_LEN // BLOCK_SIZE
    entry = tl.load(table + entry_idx, mask=entry_idx < table_stride, other=0)
    last_split = (stop - 1) // SPLIT_LEN
    if IS_DEPENDENT:
        gdc_wait()
    if (split > last_split) | (entry < 0):  # no entry is: this brings the table near while `stop` is waited for
        return
    offsets = tl.arange(0, BLOCK_N)
    n = split * SPLIT_LEN + offsets
    block = tl.load(table + n.to(tl.uint32) // BLOCK_SIZE, mask=n < stop, other=0)
    BLOCKS: tl.constexpr = SPLIT_LEN // BLOCK_N  # of a split
    num_splits = (last_split - split) // step + 1  # of this program
    newest = split + (num_splits - 1) * step
    of_newest = tl.minimum(BLOCKS, (stop - newest * SPLIT_LEN + BLOCK_N - 1) // BLOCK_N)
    num_blocks = (num_splits - 1) * BLOCKS + of_newest

    m = tl.arange(0, BLOCK_M)
    rows = first + m // GROUP
    row_mask = rows < end
    last_key = tl.load(positions + rows, mask=row_mask, other=0).to(tl.int32)
    heads = kv_head * GROUP + m % GROUP
    d = tl.arange(0, BLOCK_D)
    q_mask = row_mask[:, None]
    if BLOCK_D != HEAD_DIM:
        q_mask = q_mask & (d < HEAD_DIM)[None, :]
    q_tile = tl.load(q + rows[:, None] * q_stride + (heads * HEAD_DIM)[:, None] + d[None, :], mask=q_mask, other=0.0)
    entry = rows * NUM_HEADS + heads
    place = entry[:, None] * HEAD_DIM + d[None, :]  # in a split's partial results, and in out

    k_base = k_cache + kv_head * HEAD_DIM
    v_base = v_cache + kv_head * HEAD_DIM
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    no_acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    scale = tl.zeros((1, 1), dtype=tl.float32) + scale_log2
    acc = no_acc
    joined_top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    joined_total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    joined = no_acc
    for block_idx in range(0, num_blocks):
        start = (split + block_idx // BLOCKS * step) * SPLIT_LEN + block_idx % BLOCKS * BLOCK_N
        n = start + offsets
        is_key = n < stop
        if WINDOW > 0:
            is_key = is_key & (n >= begin)
        kv_mask = is_key[:, None]
        if BLOCK_D != HEAD_DIM:
            kv_mask = kv_mask & (d < HEAD_DIM)[None, :]
        if BLOCK_N % BLOCK_SIZE == 0:
            in_block = offsets % BLOCK_SIZE  # the same in every iteration
        else:
            in_block = n % BLOCK_SIZE
        if IS_WIDE:
            block = block.to(tl.int64)
        kv_place = (block * (BLOCK_SIZE * kv_stride))[:, None] + (in_block * kv_stride)[:, None] + d[None, :]
        k = tl.load(k_base + kv_place, mask=kv_mask, other=0.0)
        v = tl.load(v_base + kv_place, mask=kv_mask, other=0.0)
        following = block_idx + 1
        ahead = (split + following // BLOCKS * step) * SPLIT_LEN + following % BLOCKS * BLOCK_N + offsets
        block = tl.load(table + ahead.to(tl.uint32) // BLOCK_SIZE, mask=ahead < stop, other=0)

        scores = _dot(q_tile, tl.trans(k), None, IEEE)
        if HAS_CAP:
            scores = _capped(scores, cap_exponent)
        is_first = block_idx % BLOCKS == 0  # of its split
        is_partly_seen = start + BLOCK_N > whole
        if WINDOW > 0:
            is_partly_seen = is_partly_seen | (start < stop - WINDOW)
        if is_first | is_partly_seen:
            visible = n[None, :] <= last_key[:, None]
            if WINDOW > 0:
                visible = visible & (n[None, :] > (last_key - WINDOW)[:, None])
            scores = tl.where(visible, scores, float("-inf"))
            if is_first:
                if IS_SHARED:
                    if block_idx > 0:
                        at = split + (block_idx // BLOCKS - 1) * step - first_split
                        _store_split(partial, stats, at, partial_stride, stats_stride, place, entry, acc, top, total,
                                     q_mask, row_mask)  # fmt: skip
                else:
                    joined, joined_top, joined_total = _joined(joined, joined_top, joined_total, acc, top, total)
                top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)  # so acc decays to 0
                total = tl.zeros((BLOCK_M,), dtype=tl.float32)
        new_top = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
        shift = _shifted(new_top)
        weights = tl.exp2(_scaled(scores, scale, -shift[:, None]))
        decay = tl.exp2(top - shift)
        total = tl.fma(total, decay, _sum_of_weights(weights))
        acc = _dot(weights.to(v.dtype), v, _scaled(acc, decay[:, None], no_acc), IEEE)  # 0 is added, as -0 * 0 is -0
        top = new_top

    if not IS_SHARED:
        joined, joined_top, joined_total = _joined(joined, joined_top, joined_total, acc, top, total)
        tl.store(out + place, (joined / joined_total[:, None]).to(out.dtype.element_ty), mask=q_mask)
    elif first_split == last_split:  # nothing to share
        joined, joined_top, joined_total = _joined(joined, joined_top, joined_total, acc, top, total)
        tl.store(out + place, (joined / joined_total[:, None]).to(out.dtype.element_ty), mask=q_mask)
    else:
        _store_split(partial, stats, newest - first_split, partial_stride, stats_stride, place, entry, acc, top, total,
                     q_mask, row_mask)  # fmt: skip
        if JOINS:
            tl.debug_barrier()  # every thread has stored before one of them says so
            all_splits = last_split - first_split + 1
            arrival = arrived + tile_idx * tl.num_programs(0) + kv_head
            if tl.atomic_add(arrival, 1, sem="acq_rel") == tl.minimum(all_splits, step) - 1:
                tl.store(arrival, 0)
                AHEAD: tl.constexpr = (
                    8 if BLOCK_M * BLOCK_D <= 2048 else max(1, 8192 // (BLOCK_M * BLOCK_D))
                )  # of registers
                for base in range(0, all_splits, AHEAD):
                    for ahead in tl.static_range(AHEAD):
                        at = (base + ahead + tl.arange(0, 1)).to(tl.int64)
                        is_used = at < all_splits
                        stat = stats + at * stats_stride + entry * 2
                        source = partial + (at * partial_stride)[:, None] + place
                        # .cg: what other programs wrote is not in this multiprocessor's cache
                        its_top = tl.load(stat, mask=row_mask & is_used, other=float("-inf"), cache_modifier=".cg")
                        its_total = tl.load(stat + 1, mask=row_mask & is_used, other=0.0, cache_modifier=".cg")
                        part = tl.load(source, mask=q_mask & is_used[:, None], other=0.0, cache_modifier=".cg")
                        joined, joined_top, joined_total = _joined(
                            joined, joined_top, joined_total, part, its_top, its_total
                        )
                tl.store(out + place, (joined / joined_total[:, None]).to(out.dtype.element_ty), mask=q_mask)


@triton.jit(do_not_specialize=["tile_rows"])
def join_splits_kernel(
    out, partial, stats, tiles, positions, partial_stride, stats_stride, tile_rows,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, SPLIT_LEN: tl.constexpr,
    BLOCK_D: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * tile_rows, query heads): the splits of a row's head in ascending order, where there are several."""
    if IS_DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
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
    if num_splits == 1:
        return
    entry = row.to(tl.int64) * NUM_HEADS + tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    mask = d < HEAD_DIM
    first_only = tl.arange(0, 1)
    top = tl.full((1,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((1,), dtype=tl.float32)
    joined = tl.zeros((1, BLOCK_D), dtype=tl.float32)
    for start in range(0, num_splits, _READ_AHEAD):
        for ahead in tl.static_range(_READ_AHEAD):
            split = (start + ahead + first_only).to(tl.int64)
            is_used = split < num_splits  # the others left nothing in scratch
            stat = stats + split * stats_stride + entry * 2
            its_top = tl.load(stat, mask=is_used, other=float("-inf"))
            its_total = tl.load(stat + 1, mask=is_used, other=0.0)
            source = partial + (split * partial_stride + entry * HEAD_DIM)[:, None] + d[None, :]
            part = tl.load(source, mask=mask[None, :] & is_used[:, None], other=0.0)
            joined, top, total = _joined(joined, top, total, part, its_top, its_total)
    place = entry * HEAD_DIM + d[None, :]
    tl.store(out + place, (joined / total[:, None]).to(out.dtype.element_ty), mask=mask[None, :])
