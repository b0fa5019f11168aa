"""Triton kernels of lora_blocks.py: its list of blocks, shrink (x to h) and expand (h to y), weights on the left.

h [T, modules, ranks, splits] fp32, the splits up to a power of two. What a program reads of the weights it asks for
before it waits for the launch in front (`gdc_wait`, programmatic dependent launch), so weights travel while x and h are
still made. Whatever that launch wrote is read behind the wait, and every program waits before it ends, or the launch
after next would not know that this one's predecessor is done. Grids are bounds: programs walk the list, whose first
word says how long it is.

A row's sums have one order: h in parts of a chunk, K ascending in each, then the parts, then the chunks ascending; y in
ranks ascending. Instructions are of 16 by 8 whatever a tile's rows, so that these change no bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

WIDTH: tl.constexpr = tl.constexpr(5)  # int32s of an entry of the list
_PIECE: tl.constexpr = tl.constexpr(256)  # columns of y for which one block of an adapter answers


@triton.jit(do_not_specialize=["slot_stride", "ranks_column", "num_rows", "num_blocks", "tile_rows"])
def list_blocks(
    blocks, row_slots, records, slot_stride, ranks_column, num_rows, num_blocks, tile_rows,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (1,). A tile's first row writes its entries but for their end, its last row writes that."""
    row = tl.arange(0, BLOCK_T)
    in_range = row < num_rows
    own = tl.load(row_slots + row, mask=in_range, other=-1)
    before = tl.load(row_slots + row - 1, mask=in_range & (row > 0), other=-1)
    after = tl.load(row_slots + row + 1, mask=row + 1 < num_rows, other=-1)
    has_slot = own >= 0
    starts_segment = has_slot & ((row == 0) | (own != before))
    segment_start = tl.associative_scan(tl.where(starts_segment, row, 0), 0, _larger)
    offset = row - segment_start
    is_first = has_slot & (offset % tile_rows == 0)
    is_last = has_slot & ((offset % tile_rows == tile_rows - 1) | (own != after))
    ranks = tl.load(records + own.to(tl.int64) * slot_stride + ranks_column, mask=has_slot, other=0).to(tl.int32)
    ends = tl.cumsum(tl.where(is_first, ranks, 0), 0)
    for block in range(0, tl.max(ranks, 0)):
        place = ends - ranks + block
        fits = (block < ranks) & (place < num_blocks)
        entry = blocks + (1 + place) * WIDTH
        tl.store(entry, row, mask=is_first & fits)
        tl.store(entry + 1, row + 1, mask=is_last & fits)
        tl.store(entry + 2, own, mask=is_first & fits)
        tl.store(entry + 3, tl.zeros_like(row) + block, mask=is_first & fits)
        tl.store(entry + 4, ranks, mask=is_first & fits)
    tl.store(blocks, tl.minimum(tl.max(ends, 0), num_blocks))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["slot_stride"])
def lora_shrink(
    h, x, records, blocks, slot_stride, in_size, x_stride, h_ranks,
    NUM_MODULES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    PARTS: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """h[rows, module, ranks of the block, split] = A[ranks, chunk] @ x[rows, chunk]^T, for every block."""
    if IS_DEPENDENT:
        gdc_launch_dependents()
    ITEMS: tl.constexpr = NUM_MODULES * SPLITS  # of a block
    item = tl.program_id(0)
    num_items = tl.load(blocks) * ITEMS
    while item < num_items:
        entry = blocks + (1 + item // ITEMS) * WIDTH
        first, end, slot, block = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        module = (item % ITEMS) % NUM_MODULES
        split = (item % ITEMS) // NUM_MODULES
        record = records + slot.to(tl.int64) * slot_stride + module * 4
        rank = tl.load(record + 2).to(tl.int32)
        if rank > block * BLOCK_R:
            a = tl.multiple_of(tl.load(record).to(tl.pointer_type(x.dtype.element_ty)), 16)  # [R, in]
            r = block * BLOCK_R + tl.arange(0, BLOCK_R)
            rows = first + tl.arange(0, TILE_ROWS)
            part = tl.arange(0, PARTS)[:, None] * (CHUNK // PARTS)
            k = split * CHUNK + part + tl.arange(0, CHUNK // PARTS)[None, :]
            a_rows = a + r.to(tl.int64)[None, :, None] * in_size
            x_rows = x + rows.to(tl.int64)[None, :, None] * x_stride
            r_mask, row_mask = (r < rank)[None, :, None], (rows < end)[None, :, None]
            k_mask = (k < in_size)[:, None, :]
            a_tile = tl.load(a_rows + k[:, None, :], mask=r_mask & k_mask, other=0.0)  # [parts, ranks, K]
            if IS_DEPENDENT:
                gdc_wait()
            x_tile = tl.load(x_rows + k[:, None, :], mask=row_mask & k_mask, other=0.0)  # [parts, rows, K]
            acc = tl.dot(a_tile, tl.permute(x_tile, (0, 2, 1)), input_precision="ieee")  # [parts, ranks, rows]
            h_rows = h + (rows.to(tl.int64) * NUM_MODULES + module) * h_ranks * BLOCK_SPLITS + split
            tl.store(h_rows[None, :] + r[:, None] * BLOCK_SPLITS, tl.sum(acc, 0), mask=(rows < end)[None, :])
        item += tl.num_programs(0)
    if IS_DEPENDENT:
        gdc_wait()


@triton.jit(do_not_specialize=["slot_stride"])
def lora_gather(
    h, tokens, records, blocks, slot_stride, vocab_size, h_ranks,
    DTYPE: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h[row, 0, ranks of the block, 0] = A[ranks, tokens[row]]: the shrink of an embedding, whose x is one-hot.

    Waits for whatever is in front, so that the list may be made by the launch before it.
    """
    num_blocks = tl.load(blocks)
    for item in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        entry = blocks + (1 + item) * WIDTH
        first, end, slot, block = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        record = records + slot.to(tl.int64) * slot_stride
        rank = tl.load(record + 2).to(tl.int32)
        if rank > block * BLOCK_R:
            a = tl.load(record).to(tl.pointer_type(DTYPE))  # [R, V]
            rows = first + tl.arange(0, TILE_ROWS)
            r = block * BLOCK_R + tl.arange(0, BLOCK_R)
            token = tl.load(tokens + rows, mask=rows < end, other=-1)
            is_token = (token >= 0) & (token < vocab_size)  # else h is 0: nothing outside A is read
            values = tl.load(
                a + r.to(tl.int64)[None, :] * vocab_size + token[:, None],
                mask=is_token[:, None] & (r < rank)[None, :], other=0.0,
            )  # fmt: skip
            target = h + rows.to(tl.int64)[:, None] * h_ranks + r[None, :]
            tl.store(target, values.to(tl.float32), mask=(rows < end)[:, None])


@triton.jit(do_not_specialize=["slot_stride"])
def lora_expand(
    y, h, records, blocks, slot_stride, y_stride, h_ranks, out_0, out_1, out_2,
    NUM_MODULES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, DTYPE: tl.constexpr,
    TILE_ROWS: tl.constexpr, WIDE_R: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y[rows, columns] += scale * (B[columns] @ (h summed over splits)^T)^T, for every block and piece of 256 columns.

    An adapter of rank 16 has one block, which does a piece at once. Wider ones share theirs out over their blocks, in
    fourths, all ranks of each in one program.
    """
    if IS_DEPENDENT:
        gdc_launch_dependents()
    num_pieces = tl.cdiv(out_0, _PIECE)
    if NUM_MODULES > 1:
        num_pieces += tl.cdiv(out_1, _PIECE)
    if NUM_MODULES > 2:
        num_pieces += tl.cdiv(out_2, _PIECE)
    item = tl.program_id(0)
    num_items = tl.load(blocks) * num_pieces
    while item < num_items:
        entry = blocks + (1 + item // num_pieces) * WIDTH
        first, end, slot = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        block, num_blocks = tl.load(entry + 3), tl.load(entry + 4)
        module, column, out_size, piece = _module_of(item % num_pieces, out_0, out_1, out_2, NUM_MODULES)
        record = records + slot.to(tl.int64) * slot_stride + module * 4
        rank = tl.load(record + 2).to(tl.int32)
        if rank > 0:
            b = tl.multiple_of(tl.load(record + 1).to(tl.pointer_type(DTYPE)), 16)  # [out, R rounded up to 8]
            scale = tl.load(record + 3).to(tl.int32).to(tl.float32, bitcast=True)
            h_rows = h + (first.to(tl.int64) * NUM_MODULES + module) * h_ranks * BLOCK_SPLITS
            y_rows = y + first.to(tl.int64) * y_stride + column
            num_rows = end - first
            n = piece * _PIECE
            if rank <= 16:
                if block == 0:
                    _expand_columns(
                        y_rows, h_rows, b, rank, scale, num_rows, n, out_size, y_stride, h_ranks,
                        NUM_MODULES, SPLITS, BLOCK_SPLITS, TILE_ROWS, _PIECE, 16, False, IS_DEPENDENT,
                    )  # fmt: skip
            else:
                for part in range(block, 4, num_blocks):
                    if n + part * (_PIECE // 4) < out_size:
                        _expand_columns(
                            y_rows, h_rows, b, rank, scale, num_rows, n + part * (_PIECE // 4), out_size, y_stride,
                            h_ranks, NUM_MODULES, SPLITS, BLOCK_SPLITS, TILE_ROWS, _PIECE // 4, WIDE_R, True,
                            IS_DEPENDENT,
                        )  # fmt: skip
        item += tl.num_programs(0)
    if IS_DEPENDENT:
        gdc_wait()


@triton.jit
def _expand_columns(
    y, h, b, rank, scale, num_rows, first_column, out_size, y_stride, h_ranks,
    NUM_MODULES: tl.constexpr, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr, TILE_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, HAS_MORE: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y[rows, block of columns] with all ranks; `y`, `h` and `b` point at the tile's first row and the module."""
    n = first_column + tl.arange(0, BLOCK_N)
    n_mask = n < out_size
    b_stride = tl.cdiv(rank, 8) * 8
    r = tl.arange(0, BLOCK_R)
    b_ptrs = b + n.to(tl.int64)[:, None] * b_stride + r[None, :]
    b_tile = tl.load(b_ptrs, mask=n_mask[:, None] & (r < b_stride)[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
    if IS_DEPENDENT:
        gdc_wait()
    rows = tl.arange(0, TILE_ROWS)
    row_mask = rows < num_rows
    y_ptrs = y + rows.to(tl.int64)[None, :] * y_stride + n[:, None]
    y_mask = n_mask[:, None] & row_mask[None, :]
    old = tl.load(y_ptrs, mask=y_mask, other=0.0)
    h_ptrs = h + (rows.to(tl.int64)[None, :] * NUM_MODULES * h_ranks + r[:, None]) * BLOCK_SPLITS
    # Whole blocks of 16 ranks, which vectorises: beyond the rank shrink wrote products with zeros.
    h_end = tl.cdiv(rank, 16) * 16
    acc = tl.zeros((BLOCK_N, TILE_ROWS), dtype=tl.float32)
    if HAS_MORE:
        for start in range(0, rank, BLOCK_R):
            h_mask = (start + r < h_end)[:, None] & row_mask[None, :]
            total = _sum_splits(h_ptrs + start * BLOCK_SPLITS, h_mask, SPLITS, BLOCK_SPLITS)
            acc = _dot_fp32(b_tile, total, acc, y.dtype.element_ty == tl.float32)
            if start + BLOCK_R < rank:
                ahead = start + BLOCK_R
                b_tile = tl.load(b_ptrs + ahead, mask=n_mask[:, None] & (ahead + r < b_stride)[None, :], other=0.0)
    else:
        total = _sum_splits(h_ptrs, (r < h_end)[:, None] & row_mask[None, :], SPLITS, BLOCK_SPLITS)
        acc = _dot_fp32(b_tile, total, acc, y.dtype.element_ty == tl.float32)
    tl.store(y_ptrs, (old.to(tl.float32) + acc * scale).to(y.dtype.element_ty), mask=y_mask)


@triton.jit
def _sum_splits(h_ptrs, mask, SPLITS: tl.constexpr, BLOCK_SPLITS: tl.constexpr):
    """[BLOCK_R, TILE_ROWS] from pointers at the first splits: four by four, which a thread reads at once and adds."""
    GROUP: tl.constexpr = min(4, BLOCK_SPLITS)
    splits = tl.arange(0, GROUP)[None, None, :]
    total = tl.zeros(mask.shape, dtype=tl.float32)
    if mask.shape[1] == 8:
        for start in tl.static_range(0, SPLITS, GROUP):
            total += _sum_group(h_ptrs, mask, splits + start, SPLITS)
    else:  # one group at a time: all at once do not fit the registers
        for start in range(0, SPLITS, GROUP):
            total += _sum_group(h_ptrs, mask, splits + start, SPLITS)
    return total


@triton.jit
def _sum_group(h_ptrs, mask, splits, SPLITS: tl.constexpr):
    parts = tl.load(h_ptrs[:, :, None] + splits, mask=mask[:, :, None], other=0.0)
    return tl.sum(tl.where(splits < SPLITS, parts, 0.0), 2)


@triton.jit
def _module_of(piece, out_0, out_1, out_2, NUM_MODULES: tl.constexpr):
    """(module, its first column of y, its out size, the piece's place in it) of a piece: modules stand side by side."""
    module = 0
    column = 0
    out_size = out_0
    if NUM_MODULES > 1:
        end_0 = tl.cdiv(out_0, _PIECE)
        is_later = piece >= end_0
        first = tl.where(is_later, end_0, 0)
        module = tl.where(is_later, 1, module)
        column = tl.where(is_later, out_0, column)
        out_size = tl.where(is_later, out_1, out_size)
        if NUM_MODULES > 2:
            end_1 = end_0 + tl.cdiv(out_1, _PIECE)
            is_last = piece >= end_1
            first = tl.where(is_last, end_1, first)
            module = tl.where(is_last, 2, module)
            column = tl.where(is_last, out_0 + out_1, column)
            out_size = tl.where(is_last, out_2, out_size)
        piece = piece - first
    return module, column, out_size, piece


@triton.jit
def _dot_fp32(b, total, acc, IS_WIDE: tl.constexpr):
    """acc + b @ total on tensor cores where b has 16 bits: total goes in as parts, to about fp32's accuracy.

    Under a y of 16 bits (not IS_WIDE) two parts of bf16 do, 2^-17 of h.
    """
    if b.dtype == tl.bfloat16:
        high = total.to(tl.bfloat16)  # 8 bits of mantissa a part
        rest = total - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        acc = tl.dot(b, high, acc)
        acc = tl.dot(b, middle, acc)
        if IS_WIDE:
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(b, low, acc)
    elif b.dtype == tl.float16:
        # fp16 parts would overflow beyond 65504; tf32 holds fp16's b exactly and has fp32's range, 2 x 11 bits.
        b = b.to(tl.float32)
        high = (total.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        acc = tl.dot(b, high, acc, input_precision="tf32")
        acc = tl.dot(b, total - high, acc, input_precision="tf32")
    else:
        acc = tl.dot(b, total, acc, input_precision="ieee")
    return acc
