"""Triton kernels of penalties and bias: a few programs a row walk over its entries. Semantics: logit_edits.py.

An entry's token stands once among its row's, so no two lanes write one logit. Launched without fused multiply-adds,
which would round differently from the host.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _float(record, field):
    return tl.load(record + field).to(tl.float32, bitcast=True)


@triton.jit
def _entries(entries, at, end, vocab_size, ENTRY_INTS: tl.constexpr, BLOCK: tl.constexpr):
    """Records of a block of entries, their tokens, and which of them there are."""
    index = at + tl.arange(0, BLOCK)
    records = entries + index * ENTRY_INTS
    tokens = tl.load(records, mask=index < end, other=-1)
    return records, tokens, (tokens >= 0) & (tokens < vocab_size)


@triton.jit
def edit_rows(
    logits, saved, rows, entries, vocab_size, row_stride,
    ROW_INTS: tl.constexpr, ENTRY_INTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, programs a row)."""
    row = rows + tl.program_id(0) * ROW_INTS
    first, end, num_drafts = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    line = logits + tl.program_id(0).to(tl.int64) * row_stride
    kept, forbids_ends = saved + tl.load(row + 4) - first, tl.load(row + 5) != 0
    for at in range(first + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        records, tokens, valid = _entries(entries, at, end, vocab_size, ENTRY_INTS, BLOCK)
        x = tl.load(line + tokens, mask=valid, other=0.0)
        tl.store(kept + at + tl.arange(0, BLOCK), x, mask=valid)
        count = tl.load(records + 1, mask=valid, other=-1)
        for back in range(0, num_drafts):
            is_draft = tokens == tl.load(row + 3 - back * ROW_INTS)
            count = tl.where(is_draft, tl.maximum(count, 0) + 1, count)
        repetition = _float(row, 8)
        x = tl.where(count >= 0, tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition), x)
        x = tl.where(count > 0, x - (_float(row, 7) * count.to(tl.float32) + _float(row, 6)), x)
        x += tl.load(records + 2, mask=valid, other=0).to(tl.float32, bitcast=True)
        is_end = tl.load(records + 3, mask=valid, other=0) != 0
        x = tl.where(is_end & forbids_ends, float("-inf"), x)
        tl.store(line + tokens, x, mask=valid)


@triton.jit
def restore_rows(
    logits, saved, rows, entries, vocab_size, row_stride,
    ROW_INTS: tl.constexpr, ENTRY_INTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, programs a row)."""
    row = rows + tl.program_id(0) * ROW_INTS
    first, end = tl.load(row), tl.load(row + 1)
    line = logits + tl.program_id(0).to(tl.int64) * row_stride
    kept = saved + tl.load(row + 4) - first
    for at in range(first + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
        _, tokens, valid = _entries(entries, at, end, vocab_size, ENTRY_INTS, BLOCK)
        tl.store(line + tokens, tl.load(kept + at + tl.arange(0, BLOCK), mask=valid, other=0.0), mask=valid)
