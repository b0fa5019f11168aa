"""Triton kernels of the heads' loop that make states: the first product, the GRU cell. Semantics: head_loop.py.

Programs walk lists of work (head_loop_choice_triton.py makes them): an entry is a tile of up to TILE_ROWS sequences of
one head and a block of its outputs. Weights are the left operand of tensor cores; what is fp32 goes in as three parts
of bf16, which carry its 24 bits. Instructions and the order of sums are those of a full tile whatever a tile holds, so
a sequence's bits do not depend on its neighbours. Where IS_DEPENDENT, launches overlap (programmatic dependent launch):
weights are asked for before the wait (`gdc_wait`), what earlier launches of the loop wrote is read behind it, and every
program waits before it ends.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .head_loop_fields_triton import (
    CANDIDATE_BIAS,
    INIT_WEIGHT,
    MOVE_GATES,
    NEXT_GATES,
    QUERY_WEIGHT,
    SLOT_WEIGHT,
    STATE_GATES,
    TAP,
    TOKEN_GATES,
    WINDOW,
    WORK_WIDTH,
    dot_parts,
    floats_of,
    parts_of,
    size_of,
    state_size_of,
    tanh,
    weights_of,
)


@triton.jit(do_not_specialize=["capacity", "chunks_a_half"])
def begin_states(
    partials, squares, hidden, tapped, last_row, cells, addresses, sizes,
    hidden_size, hidden_stride, tapped_stride, tap_stride, capacity, state_stride, chunks_a_half,
    IS_BF16: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, TILE_ROWS: tl.constexpr,
    CELL_BLOCK: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Items: entries by chunks of both halves. Parts of the first product, before normalisation.

    Waits for nothing: it is launched behind all that it reads.
    """
    if IS_DEPENDENT:
        gdc_launch_dependents()
    num_chunks = 2 * chunks_a_half
    num_items = tl.load(cells) * num_chunks
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0), disable_licm=True):
        entry = cells + (1 + item // num_chunks) * WORK_WIDTH
        first, end, head, block = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        d = state_size_of(sizes, head)
        chunk = item % num_chunks
        half = chunk // chunks_a_half
        start = chunk % chunks_a_half * CHUNK
        n = block * CELL_BLOCK + tl.arange(0, CELL_BLOCK)
        part = tl.arange(0, PARTS)[:, None] * (CHUNK // PARTS)
        k = start + part + tl.arange(0, CHUNK // PARTS)[None, :]
        k_mask = (k < hidden_size)[:, None, :]
        weight = weights_of(addresses, head, INIT_WEIGHT) + half * hidden_size
        w = tl.load(
            weight + n.to(tl.int64)[None, :, None] * (2 * hidden_size) + k[:, None, :],
            mask=(n < d)[None, :, None] & k_mask, other=0.0,
        )  # [parts, n, k]  # fmt: skip
        seqs = first + tl.arange(0, TILE_ROWS)
        row_mask = seqs < end
        rows = tl.load(last_row + seqs, mask=row_mask, other=0).to(tl.int64)[None, :, None]
        tap = size_of(sizes, head, TAP).to(tl.int64) * tap_stride
        of_hidden = tl.where(half == 0, hidden_size, 0)  # columns read of either
        x_mask = row_mask[None, :, None] & (k < of_hidden)[:, None, :]
        y_mask = row_mask[None, :, None] & (k < hidden_size - of_hidden)[:, None, :]
        x = tl.load(hidden + rows * hidden_stride + k[:, None, :], mask=x_mask, other=0.0)  # [parts, rows, k]
        y = tl.load(tapped + tap + rows * tapped_stride + k[:, None, :], mask=y_mask, other=0.0)
        x = tl.where(y_mask, y, x)
        if not IS_BF16:
            x, w = x.to(tl.float32), w.to(tl.float32)
        product = tl.sum(tl.dot(w, tl.permute(x, (0, 2, 1)), input_precision="ieee"), 0)  # [n, rows]
        place = (chunk * capacity + seqs).to(tl.int64)
        target = partials + place[None, :] * state_stride + n[:, None]
        tl.store(target, product, mask=row_mask[None, :] & (n < d)[:, None])
        if block == 0:
            wide = x.to(tl.float32)
            tl.store(squares + place, tl.sum(tl.sum(wide * wide, 2), 0), mask=row_mask)


@triton.jit(do_not_specialize=["capacity", "position_idx"])
def step_cells(
    new_states, queries, slots, states, input_tokens, moves, next_tokens, cells, addresses, sizes,
    capacity, state_stride, position_idx,
    TILE_ROWS: tl.constexpr, CELL_BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr, WIDTH: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Items: entries. The GRU cell of a block of the state, and what it gives to the queries and the window's slots."""
    if IS_DEPENDENT:
        gdc_launch_dependents()
    num_items = tl.load(cells)
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0), disable_licm=True):
        entry = cells + (1 + item) * WORK_WIDTH
        first, end, head, block = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        if position_idx < tl.load(entry + 4):
            d, window = state_size_of(sizes, head), size_of(sizes, head, WINDOW)
            n = block * CELL_BLOCK + tl.arange(0, CELL_BLOCK)
            n_mask = n < d
            part = tl.arange(0, PARTS)[:, None] * (BLOCK_D // PARTS)
            k = part + tl.arange(0, BLOCK_D // PARTS)[None, :]
            gates = weights_of(addresses, head, STATE_GATES) + (n[None, :, None] * d + k[:, None, :])
            m = tl.arange(0, BLOCK_Q)
            num_queries = tl.where(window > 0, 2 * d, d)
            query_ptrs = weights_of(addresses, head, QUERY_WEIGHT) + (n[None, :] * (2 * d) + m[:, None])
            w_query = tl.load(query_ptrs, mask=(m < num_queries)[:, None] & n_mask[None, :], other=0.0)  # [m, n]
            slot = tl.arange(0, WIDTH)
            slot_stride = tl.multiple_of((window + 15) // 16 * 16, 16)
            slot_ptrs = weights_of(addresses, head, SLOT_WEIGHT) + (n[None, :] * slot_stride + slot[:, None])
            w_slot = tl.load(slot_ptrs, mask=(slot < slot_stride)[:, None] & n_mask[None, :], other=0.0)
            bias = tl.load(floats_of(addresses, head, CANDIDATE_BIAS) + n, mask=n_mask, other=0.0)
            of_token, of_next = floats_of(addresses, head, TOKEN_GATES), floats_of(addresses, head, NEXT_GATES)
            of_move = floats_of(addresses, head, MOVE_GATES)
            seqs = first + tl.arange(0, TILE_ROWS)
            row_mask = seqs < end
            rows = seqs * state_stride
            reset = tl.zeros((PARTS, CELL_BLOCK, TILE_ROWS), dtype=tl.float32)
            update = tl.zeros((PARTS, CELL_BLOCK, TILE_ROWS), dtype=tl.float32)
            from_state = tl.zeros((PARTS, CELL_BLOCK, TILE_ROWS), dtype=tl.float32)
            x_reset = tl.zeros((CELL_BLOCK, TILE_ROWS), dtype=tl.float32)
            x_update = tl.zeros((CELL_BLOCK, TILE_ROWS), dtype=tl.float32)
            x_state = tl.zeros((CELL_BLOCK, TILE_ROWS), dtype=tl.float32)
            for start in range(0, d, BLOCK_D):
                k_mask = (start + k < d)[:, None, :]
                gate_mask = n_mask[None, :, None] & k_mask
                w_reset = tl.load(gates + start, mask=gate_mask, other=0.0)  # [parts, n, k]
                w_update = tl.load(gates + start + d * d, mask=gate_mask, other=0.0)
                w_state = tl.load(gates + start + 2 * d * d, mask=gate_mask, other=0.0)
                if IS_DEPENDENT:
                    gdc_wait()
                is_fed = seqs < tl.where(start == 0, end, first)  # once, and before the products
                token = tl.load(input_tokens + seqs, mask=is_fed, other=0).to(tl.int64) * (3 * d)
                following = tl.load(next_tokens + seqs, mask=is_fed, other=0).to(tl.int64) * (3 * d)
                moved = tl.load(moves + seqs, mask=is_fed, other=0) * (3 * d)
                fed_mask = n_mask[:, None] & is_fed[None, :]
                x_reset, x_update, x_state = _add_input(
                    x_reset, x_update, x_state, of_token + (token[None, :] + n[:, None]),
                    of_next + (following[None, :] + n[:, None]), of_move + (moved[None, :] + n[:, None]), d, fed_mask,
                )  # fmt: skip
                state_ptrs = states + rows[None, :, None] + (start + k)[:, None, :]
                state = tl.load(state_ptrs, mask=row_mask[None, :, None] & k_mask, other=0.0)
                high, middle, low = parts_of(tl.permute(state, (0, 2, 1)))  # [parts, k, rows]
                reset = dot_parts(w_reset, high, middle, low, reset)
                update = dot_parts(w_update, high, middle, low, update)
                from_state = dot_parts(w_state, high, middle, low, from_state)
            mask = n_mask[:, None] & row_mask[None, :]
            old = tl.load(states + rows[None, :] + n[:, None], mask=mask, other=0.0)
            reset_gate = tl.sigmoid(tl.sum(reset, 0) + x_reset)  # [n, rows]
            update_gate = tl.sigmoid(tl.sum(update, 0) + x_update)
            candidate = tanh(x_state + reset_gate * (tl.sum(from_state, 0) + bias[:, None]))
            new = candidate + update_gate * (old - candidate)
            tl.store(new_states + rows[None, :] + n[:, None], new, mask=mask)

            high, middle, low = parts_of(new)
            place = block * capacity + seqs
            target = queries + place[None, :] * (2 * state_stride) + m[:, None]
            query = tl.zeros((BLOCK_Q, TILE_ROWS), dtype=tl.float32)
            query = dot_parts(w_query, high, middle, low, query)
            tl.store(target, query, mask=(m < num_queries)[:, None] & row_mask[None, :])
            for start in range(BLOCK_Q, num_queries, BLOCK_Q):
                mask_here = (start + m < num_queries)[:, None]
                w_more = tl.load(query_ptrs + start, mask=mask_here & n_mask[None, :], other=0.0)
                query = tl.zeros((BLOCK_Q, TILE_ROWS), dtype=tl.float32)
                query = dot_parts(w_more, high, middle, low, query)
                tl.store(target + start, query, mask=mask_here & row_mask[None, :])
            if window > 0:
                given = tl.zeros((WIDTH, TILE_ROWS), dtype=tl.float32)
                given = dot_parts(w_slot, high, middle, low, given)
                tl.store(slots + place[None, :] * WIDTH + slot[:, None], given, mask=row_mask[None, :])
    if IS_DEPENDENT:
        gdc_wait()


@triton.jit
def _add_input(reset, update, candidate, of_token, of_next, of_move, d, mask):
    """What the input gives to the three gates: sums of three tables' rows."""
    reset += tl.load(of_token, mask=mask, other=0.0) + tl.load(of_next, mask=mask, other=0.0)
    update += tl.load(of_token + d, mask=mask, other=0.0) + tl.load(of_next + d, mask=mask, other=0.0)
    candidate += tl.load(of_token + 2 * d, mask=mask, other=0.0) + tl.load(of_next + 2 * d, mask=mask, other=0.0)
    reset += tl.load(of_move, mask=mask, other=0.0)
    update += tl.load(of_move + d, mask=mask, other=0.0)
    candidate += tl.load(of_move + 2 * d, mask=mask, other=0.0)
    return reset, update, candidate
