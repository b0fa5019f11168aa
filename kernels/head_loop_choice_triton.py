"""Triton kernels of the heads' loop that belong to one sequence: its work, its copy pointer, its choice.

Grids are sequences. How launches overlap: head_loop_cells_triton.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .head_loop_fields_triton import (
    DRAFT_LEN,
    INIT_BIAS,
    JUMP_START,
    LOCAL_OF,
    NUM_SIZES,
    NUM_TOKENS,
    STATE_SIZE,
    TOKEN_OF,
    WINDOW,
    WORK_WIDTH,
    floats_of,
    ids_of,
    size_of,
    state_size_of,
    tanh,
)

_JUMP_BLOCK = tl.constexpr(1024)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _heads_of(rows, mask, seats, head_ids, last_row):
    """Head of each sequence that takes part, -1 of others."""
    head = tl.load(head_ids + rows, mask=mask, other=-1)
    seat, row = tl.load(seats + rows, mask=mask, other=-1), tl.load(last_row + rows, mask=mask, other=-1)
    return tl.where((seat >= 0) & (row >= 0), head, -1)


@triton.jit
def _write_entries(work, place, num, first, end, head, num_positions, MOST: tl.constexpr):
    block = tl.arange(0, MOST)
    entry = work + (1 + place + block) * WORK_WIDTH
    mask = block < num
    tl.store(entry, tl.zeros_like(block) + first, mask=mask)
    tl.store(entry + 1, tl.zeros_like(block) + end, mask=mask)
    tl.store(entry + 2, tl.zeros_like(block) + head, mask=mask)
    tl.store(entry + 3, block, mask=mask)
    tl.store(entry + 4, tl.zeros_like(block) + num_positions, mask=mask)


@triton.jit(do_not_specialize=["num_seqs"])
def list_work(
    cells, blocks, seats, head_ids, last_row, num_guesses, sizes, num_seqs,
    TILE_ROWS: tl.constexpr, CELL_BLOCK: tl.constexpr, TOKEN_BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
    MOST_CELLS: tl.constexpr, MOST_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Lists of work of the state and of the vocabulary; their first words are their lengths.

    A tile is up to TILE_ROWS neighbours with one head. An entry: (first sequence, end, head, block, positions at which
    any of them wants a guess). Each program looks at all sequences and writes the entries of the tile that its own
    begins.
    """
    seq = tl.program_id(0)
    row = tl.arange(0, BLOCK_S)
    own = _heads_of(row, row < num_seqs, seats, head_ids, last_row)
    before = _heads_of(row - 1, (row > 0) & (row <= num_seqs), seats, head_ids, last_row)
    after = _heads_of(row + 1, row + 1 < num_seqs, seats, head_ids, last_row)
    has_head = own >= 0
    starts_run = has_head & ((row == 0) | (own != before))
    offset = row - tl.associative_scan(tl.where(starts_run, row, 0), 0, _larger)
    is_first = has_head & (offset % TILE_ROWS == 0)
    is_last = has_head & ((offset % TILE_ROWS == TILE_ROWS - 1) | (own != after))
    of_head = sizes + own * NUM_SIZES
    d = tl.load(of_head + STATE_SIZE, mask=is_first, other=0)
    num_tokens = tl.load(of_head + NUM_TOKENS, mask=is_first & (d > 0), other=-1)
    num_cells, num_blocks = tl.cdiv(d, CELL_BLOCK), tl.cdiv(num_tokens + 1, TOKEN_BLOCK)
    if seq == 0:
        tl.store(cells, tl.sum(num_cells, 0))
        tl.store(blocks, tl.sum(num_blocks, 0))
    end = tl.min(tl.where(is_last & (row >= seq), row + 1, num_seqs), 0)
    is_own = has_head & (row >= seq) & (row < end)
    wanted = tl.load(num_guesses + row, mask=is_own, other=0)
    wanted = tl.minimum(wanted, tl.load(of_head + DRAFT_LEN, mask=is_own, other=0))
    num_positions = tl.max(tl.where(is_own, wanted, 0), 0)
    head = tl.max(tl.where(row == seq, own, -1), 0)
    is_before, is_here = row < seq, row == seq
    place, num = tl.sum(tl.where(is_before, num_cells, 0), 0), tl.sum(tl.where(is_here, num_cells, 0), 0)
    _write_entries(cells, place, num, seq, end, head, num_positions, MOST_CELLS)
    place, num = tl.sum(tl.where(is_before, num_blocks, 0), 0), tl.sum(tl.where(is_here, num_blocks, 0), 0)
    _write_entries(blocks, place, num, seq, end, head, num_positions, MOST_BLOCKS)


@triton.jit
def _followed(prompt, position, length, jump_start, token, found, WIDTH: tl.constexpr):
    """Pointer and move after `token`: just behind its first place `found` in the window, WIDTH where it is not there.

    Else behind its first place from `jump_start` on, but not behind the prompt's last token; -1: it does not jump.
    """
    moved = tl.where(found == 0, 1, tl.where(found < WIDTH, 2, 0))
    if (found == WIDTH) & (jump_start >= 0):
        place = length
        for start in range(jump_start, length - 1, _JUMP_BLOCK):
            every = start + tl.arange(0, _JUMP_BLOCK)
            is_near = every < length - 1
            tokens = tl.load(prompt + every, mask=is_near, other=-1)
            place = tl.minimum(place, tl.min(tl.where(is_near & (tokens == token), every, length), axis=0))
        moved = tl.where(place < length, 2, 0)
        position = tl.where(place < length, place + 1, position)
    return tl.where(found < WIDTH, position + found + 1, position), moved


@triton.jit
def _store_input(
    input_tokens, moves, next_tokens, draft_positions, prompt_local, seq, token, moved, position, length, num_tokens,
    window,
):  # fmt: skip
    """What the cell is fed next; prompt_local points at the sequence's prompt."""
    # Nothing at the pointer reads as token 0, no window at all as "another token": so heads are trained.
    following = tl.load(prompt_local + position, mask=position < length, other=0)
    tl.store(input_tokens + seq, token)
    tl.store(moves + seq, moved)
    tl.store(next_tokens + seq, tl.where(window == 0, num_tokens, following))
    tl.store(draft_positions + seq, position)


@triton.jit(do_not_specialize=["capacity", "chunks_a_half", "prompt_stride"])
def start_sequences(
    state, input_tokens, moves, next_tokens, draft_positions, positions, prompt_tokens, prompt_local, prompt_lens,
    seats, head_ids, first_rows, num_accepted, last_row, sampled, partials, squares, addresses, sizes,
    hidden_size, capacity, state_stride, chunks_a_half, prompt_stride,
    BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Follow the tokens that were kept, the newest of which is the first input; the first state.

    That is tanh of both halves, each normalised, and the bias. Only it waits for the first product.
    """
    if IS_DEPENDENT:
        gdc_launch_dependents()
    seq = tl.program_id(0)
    seat, head = tl.load(seats + seq), tl.load(head_ids + seq)
    if (seat >= 0) & (head >= 0) & (tl.load(last_row + seq) >= 0):
        first, num = tl.load(first_rows + seq), tl.load(num_accepted + seq) + 1
        prompt = seat.to(tl.int64) * prompt_stride
        position, length = tl.load(positions + seat), tl.load(prompt_lens + seat)
        window, num_tokens = size_of(sizes, head, WINDOW), size_of(sizes, head, NUM_TOKENS)
        jump_start = size_of(sizes, head, JUMP_START)
        entry = tl.arange(0, WIDTH)
        for idx in range(0, num):
            token = tl.load(sampled + first + idx).to(tl.int32)
            is_filled = (entry < window) & (position + entry < length)
            seen = tl.load(prompt_tokens + prompt + position + entry, mask=is_filled, other=-1)
            found = tl.min(tl.where(is_filled & (seen == token), entry, WIDTH), axis=0)
            position, moved = _followed(prompt_tokens + prompt, position, length, jump_start, token, found, WIDTH)
            if idx == num - 1:
                local = tl.load(ids_of(addresses, head, LOCAL_OF) + token)
                _store_input(
                    input_tokens, moves, next_tokens, draft_positions, prompt_local + prompt,
                    seq, local, moved, position, length, num_tokens, window,
                )  # fmt: skip
        tl.debug_barrier()  # every warp has read the place that one of them writes
        tl.store(positions + seat, position)
        d = state_size_of(sizes, head)
        n = tl.arange(0, BLOCK_D)
        total = tl.load(floats_of(addresses, head, INIT_BIAS) + n, mask=n < d, other=0.0)
        if IS_DEPENDENT:
            gdc_wait()
        for half in range(0, 2):
            product = tl.zeros((BLOCK_D,), dtype=tl.float32)
            square = 0.0
            for chunk in range(0, chunks_a_half):
                place = (half * chunks_a_half + chunk) * capacity + seq
                product += tl.load(partials + place.to(tl.int64) * state_stride + n, mask=n < d, other=0.0)
                square += tl.load(squares + place)
            total += product / tl.sqrt(square / hidden_size + 1e-6)
        tl.store(state + seq.to(tl.int64) * state_stride + n, tanh(total), mask=n < d)
    if IS_DEPENDENT:
        gdc_wait()


@triton.jit(do_not_specialize=["capacity", "num_blocks", "score_stride", "prompt_stride", "position_idx"])
def choose(
    guesses, probabilities, input_tokens, moves, next_tokens, draft_positions,
    scores, block_stats, block_tokens, entry_scores, entry_tokens,
    prompt_tokens, prompt_local, prompt_lens, seats, head_ids, last_row, num_guesses, addresses, sizes,
    capacity, num_blocks, score_stride, prompt_stride, guess_stride, position_idx,
    MOST_BLOCKS: tl.constexpr, TOKEN_BLOCK: tl.constexpr, WIDTH: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The most likely choice of vocabulary and window, and the next input that it makes."""
    if IS_DEPENDENT:
        gdc_launch_dependents()
    seq = tl.program_id(0)
    seat, head = tl.load(seats + seq), tl.load(head_ids + seq)
    goes_on = (seat >= 0) & (head >= 0) & (tl.load(last_row + seq) >= 0) & (position_idx < tl.load(num_guesses + seq))
    # Of who takes no part: anybody's, so that no load but the window's scores hangs on another.
    seat, head = tl.maximum(seat, 0), tl.maximum(head, 0)
    goes_on = goes_on & (position_idx < size_of(sizes, head, DRAFT_LEN))
    num_tokens, window = size_of(sizes, head, NUM_TOKENS), size_of(sizes, head, WINDOW)
    jump_start, token_of = size_of(sizes, head, JUMP_START), ids_of(addresses, head, TOKEN_OF)
    length = tl.load(prompt_lens + seat)
    prompt = seat.to(tl.int64) * prompt_stride
    if IS_DEPENDENT:
        gdc_wait()
    line = guesses + seq * guess_stride + position_idx
    had_guess = tl.load(line - 1, mask=position_idx > 0, other=0) >= 0
    tl.store(line, -1)
    tl.store(probabilities + seq * guess_stride + position_idx, 0.0)
    if goes_on:
        pointer = tl.load(draft_positions + seq)
        idx = tl.arange(0, WIDTH)
        is_filled = (idx < window) & (pointer + idx < length)
        seen = tl.load(prompt_tokens + prompt + pointer + idx, mask=is_filled, other=-1)  # [W]
        local = tl.load(entry_tokens + seq * WIDTH + idx, mask=idx < window, other=-1)
        entry_score = tl.load(entry_scores + seq * WIDTH + idx, mask=idx < window, other=float("-inf"))
        block = tl.arange(0, MOST_BLOCKS)
        has_block = block < tl.cdiv(num_tokens + 1, TOKEN_BLOCK)
        stats = block_stats + seq * num_blocks + block
        best_of_block = tl.load(stats, mask=has_block, other=float("-inf"))
        top_of_block = tl.load(stats + capacity * num_blocks, mask=has_block, other=float("-inf"))
        total_of_block = tl.load(stats + 2 * capacity * num_blocks, mask=has_block, other=0.0)
        token_of_block = tl.load(block_tokens + seq * num_blocks + block, mask=has_block, other=num_tokens)
        is_known = is_filled & (local < num_tokens)
        own = tl.load(scores + seq * score_stride + tl.maximum(local, 0), mask=is_known, other=float("-inf"))

        best = tl.max(best_of_block, axis=0)
        token = tl.min(tl.where(best_of_block == best, token_of_block, num_tokens), axis=0)
        top = tl.maximum(tl.max(entry_score, axis=0), tl.max(top_of_block, axis=0))
        total = tl.sum(tl.where(is_filled, tl.exp(entry_score - top), 0.0), axis=0)
        total += tl.sum(tl.where(has_block, total_of_block * tl.exp(top_of_block - top), 0.0), axis=0)
        entry_prob = tl.where(is_filled, tl.exp(entry_score - top) / total, 0.0)  # [W]
        is_same = (local[:, None] == local[None, :]) & is_known[:, None] & is_known[None, :]
        merged = tl.exp(own - top) / total + tl.sum(tl.where(is_same, entry_prob[None, :], 0.0), axis=1)
        merged = tl.where(is_known, merged, -1.0)
        # A token of the window is at least as likely merged as alone, so the best of all alone is the others' best.
        prob = tl.exp(best - top) / total
        merged_prob = tl.max(merged, axis=0)
        merged_token = tl.min(tl.where(merged == merged_prob, local, num_tokens), axis=0)
        takes = (merged_prob > prob) | ((merged_prob == prob) & (merged_token < token))
        token, prob = tl.where(takes, merged_token, token), tl.where(takes, merged_prob, prob)
        copied = tl.where(is_filled & (local >= num_tokens), entry_prob, 0.0)
        copied_prob = tl.max(copied, axis=0)
        copied_idx = tl.min(tl.where(copied == copied_prob, idx, WIDTH), axis=0)
        copies = copied_prob > prob
        prob = tl.where(copies, copied_prob, prob)
        if had_guess & (total > 0.0) & (prob >= 0.0):  # NaN is neither: the head then has nothing to say
            of_prompt = tl.sum(tl.where(idx == copied_idx, seen, 0), axis=0)
            # In its own vocabulary a known token is found without its id, which is on its way.
            is_next = is_filled & tl.where(copies, seen == of_prompt, local == token)
            found = tl.min(tl.where(is_next, idx, WIDTH), axis=0)
            guess = tl.load(token_of + token, mask=token < num_tokens, other=0)
            guess = tl.where(copies, of_prompt, guess)
            tl.store(line, guess)
            tl.store(probabilities + seq * guess_stride + position_idx, tl.minimum(prob, 1.0))
            pointer, moved = _followed(prompt_tokens + prompt, pointer, length, jump_start, guess, found, WIDTH)
            _store_input(
                input_tokens, moves, next_tokens, draft_positions, prompt_local + prompt,
                seq, tl.where(copies, num_tokens, token), moved, pointer, length, num_tokens, window,
            )  # fmt: skip
