"""Triton kernels of the heads' loop that score the vocabulary and the window. Semantics: head_loop.py.

Lists of work, products and how launches overlap: head_loop_cells_triton.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .head_loop_fields_triton import (
    DRAFT_LEN,
    EMBED,
    KEY_SIZE,
    NUM_TOKENS,
    OUT_BIAS,
    SLOT_BIAS,
    WINDOW,
    WORK_WIDTH,
    dot_parts,
    floats_of,
    parts_of,
    size_of,
    state_size_of,
    weights_of,
)


@triton.jit(do_not_specialize=["num_seqs", "capacity", "score_stride", "num_blocks", "prompt_stride", "position_idx"])
def score(
    scores, block_stats, block_tokens, entry_scores, entry_tokens, queries, slots, draft_positions,
    prompt_local, prompt_lens, seats, head_ids, last_row, num_guesses, blocks, addresses, sizes,
    num_seqs, capacity, state_stride, score_stride, num_blocks, prompt_stride, position_idx,
    TILE_ROWS: tl.constexpr, CELL_BLOCK: tl.constexpr, TOKEN_BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Items: sequences, then entries. Scores of a window's entries; logits of a block of the vocabulary, their best.

    "Another token" counts in a block's sum and is never its best.
    """
    if IS_DEPENDENT:
        gdc_launch_dependents()
    num_items = tl.load(blocks) + num_seqs
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0), disable_licm=True):
        if item < num_seqs:
            head = tl.load(head_ids + item)
            seat = tl.load(seats + item)
            if (head >= 0) & (seat >= 0) & (tl.load(last_row + item) >= 0):
                most = tl.minimum(size_of(sizes, head, DRAFT_LEN), tl.load(num_guesses + item))
                if (position_idx < most) & (size_of(sizes, head, WINDOW) > 0):
                    _score_window(
                        entry_scores, entry_tokens, queries, slots, draft_positions, prompt_local, prompt_lens,
                        addresses, sizes, item, head, seat, capacity, state_stride, prompt_stride,
                        CELL_BLOCK, BLOCK_D, WIDTH, IS_DEPENDENT,
                    )  # fmt: skip
        else:
            entry = blocks + (1 + item - num_seqs) * WORK_WIDTH
            if position_idx < tl.load(entry + 4):
                _score_block(
                    scores, block_stats, block_tokens, queries, addresses, sizes, entry,
                    capacity, state_stride, score_stride, num_blocks,
                    TILE_ROWS, CELL_BLOCK, TOKEN_BLOCK, BLOCK_D, IS_DEPENDENT,
                )  # fmt: skip
    if IS_DEPENDENT:
        gdc_wait()


@triton.jit
def _score_block(
    scores, block_stats, block_tokens, queries, addresses, sizes, entry,
    capacity, state_stride, score_stride, num_blocks,
    TILE_ROWS: tl.constexpr, CELL_BLOCK: tl.constexpr, TOKEN_BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    first, end, head, block = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    d, num_tokens = state_size_of(sizes, head), size_of(sizes, head, NUM_TOKENS)
    u = block * TOKEN_BLOCK + tl.arange(0, TOKEN_BLOCK)
    u_mask = u <= num_tokens
    k = tl.arange(0, BLOCK_D)
    embed = weights_of(addresses, head, EMBED) + (u[:, None] * d + k[None, :])
    bias = tl.load(floats_of(addresses, head, OUT_BIAS) + u, mask=u_mask, other=0.0)
    seqs = first + tl.arange(0, TILE_ROWS)
    row_mask = seqs < end
    queries += seqs[:, None] * (2 * state_stride) + k[None, :]
    block_stride = capacity * (2 * state_stride)
    logits = tl.zeros((TOKEN_BLOCK, TILE_ROWS), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        weight = tl.load(embed + start, mask=u_mask[:, None] & (start + k < d)[None, :], other=0.0)  # [U, k]
        if IS_DEPENDENT:
            gdc_wait()
        mask = row_mask[:, None] & (start + k < d)[None, :]
        query = tl.zeros((TILE_ROWS, BLOCK_D), dtype=tl.float32)
        query = _add_cells(query, queries + start, block_stride, tl.cdiv(d, CELL_BLOCK), mask)
        high, middle, low = parts_of(query)
        logits = dot_parts(weight, tl.trans(high), tl.trans(middle), tl.trans(low), logits)
    logits += bias[:, None]
    target = scores + (seqs[None, :] * score_stride + u[:, None])
    tl.store(target, logits, mask=u_mask[:, None] & row_mask[None, :])
    choosable = tl.where((u < num_tokens)[:, None], logits, float("-inf"))
    best = tl.max(choosable, 0)  # [rows]
    token = tl.min(tl.where((choosable == best[None, :]) & (u < num_tokens)[:, None], u[:, None], num_tokens), 0)
    largest = tl.max(tl.where(u_mask[:, None], logits, float("-inf")), 0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.where(u_mask[:, None], tl.exp(logits - shift[None, :]), 0.0), 0)
    place = seqs * num_blocks + block
    tl.store(block_stats + place, best, mask=row_mask)
    tl.store(block_stats + capacity * num_blocks + place, largest, mask=row_mask)
    tl.store(block_stats + 2 * capacity * num_blocks + place, total, mask=row_mask)
    tl.store(block_tokens + place, token, mask=row_mask)


@triton.jit
def _add_cells(total, given, block_stride, num_cells, mask):
    """total + what each block of the state gave, in order; four of them are asked for at once."""
    for first in range(0, num_cells, 4):
        for idx in tl.static_range(4):
            here = tl.where(first + idx < num_cells, mask, False)
            total += tl.load(given + (first + idx) * block_stride, mask=here, other=0.0)
    return total


@triton.jit
def _score_window(
    entry_scores, entry_tokens, queries, slots, draft_positions, prompt_local, prompt_lens,
    addresses, sizes, seq, head, seat, capacity, state_stride, prompt_stride,
    CELL_BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The entries of one sequence's window: the slot's score, and how its token answers the query."""
    d, window = state_size_of(sizes, head), size_of(sizes, head, WINDOW)
    length = tl.load(prompt_lens + seat)
    idx = tl.arange(0, WIDTH)
    entry_score = tl.load(floats_of(addresses, head, SLOT_BIAS) + idx, mask=idx < window, other=0.0)
    embed = weights_of(addresses, head, EMBED)
    if IS_DEPENDENT:
        gdc_wait()
    pointer = tl.load(draft_positions + seq)
    is_filled = (idx < window) & (pointer + idx < length)
    line = seat.to(tl.int64) * prompt_stride + pointer
    local = tl.load(prompt_local + line + idx, mask=is_filled, other=-1)  # [W]
    k = tl.arange(0, BLOCK_D)
    match = tl.zeros((WIDTH,), dtype=tl.float32)
    of_seq = queries + seq * (2 * state_stride) + d
    block_stride = capacity * (2 * state_stride)
    num_cells = tl.cdiv(d, CELL_BLOCK)
    for start in range(0, d, BLOCK_D):
        key_ptrs = embed + tl.maximum(local, 0)[:, None] * d + (start + k)[None, :]
        keys = tl.load(key_ptrs, mask=is_filled[:, None] & (start + k < d)[None, :], other=0.0)  # [W, k]
        query = tl.zeros((BLOCK_D,), dtype=tl.float32)
        query = _add_cells(query, of_seq + start + k, block_stride, num_cells, start + k < d)
        match += tl.sum(keys.to(tl.float32) * query[None, :], axis=1)
    given = tl.zeros((WIDTH,), dtype=tl.float32)
    given = _add_cells(given, slots + seq * WIDTH + idx, capacity * WIDTH, num_cells, idx < window)
    entry_score += given + match / tl.sqrt(size_of(sizes, head, KEY_SIZE).to(tl.float32))
    tl.store(entry_scores + seq * WIDTH + idx, tl.where(is_filled, entry_score, float("-inf")))
    tl.store(entry_tokens + seq * WIDTH + idx, local)
