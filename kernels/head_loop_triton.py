"""Triton kernels of the lookahead heads' loop: five launches a position, three before the first.

The only file of the two that imports triton; head_loop.py launches these and states what they compute. Products work on
tiles of sequences with one head, whose weights are found through a table of addresses; what belongs to one sequence,
its pointer and its choice, is one program's. No program waits for another. All sums are fp32 in a fixed order, so a
sequence's guesses do not depend on who else is in the batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Fields of the tables, in head_loop.py's order.
INIT_WEIGHT = tl.constexpr(0)
INIT_BIAS = tl.constexpr(1)
EMBED = tl.constexpr(2)
OUT_BIAS = tl.constexpr(3)
MOVES = tl.constexpr(4)
NEXT_WEIGHT = tl.constexpr(5)
GATES_X = tl.constexpr(6)
GATES_S = tl.constexpr(7)
GATES_BIAS = tl.constexpr(8)
CANDIDATE_BIAS = tl.constexpr(9)
OUT_WEIGHT = tl.constexpr(10)
COPY_WEIGHT = tl.constexpr(11)
SLOT_WEIGHT = tl.constexpr(12)
SLOT_BIAS = tl.constexpr(13)
LOCAL_OF = tl.constexpr(14)
TOKEN_OF = tl.constexpr(15)
NUM_ADDRESSES = tl.constexpr(16)
STATE_SIZE = tl.constexpr(0)
NUM_TOKENS = tl.constexpr(1)
WINDOW = tl.constexpr(2)
DRAFT_LEN = tl.constexpr(3)
TAP = tl.constexpr(4)
KEY_SIZE = tl.constexpr(5)
JUMP_START = tl.constexpr(6)
NUM_SIZES = tl.constexpr(7)
_JUMP_BLOCK = tl.constexpr(256)


@triton.jit
def _size(sizes, head, field):
    return tl.load(sizes + head * NUM_SIZES + field)


@triton.jit
def _state_size(sizes, head):
    """The head's d; rows of weights are padded, so that loads may be vectors."""
    return tl.multiple_of(tl.load(sizes + head * NUM_SIZES + STATE_SIZE), 16)


@triton.jit
def _weights(addresses, head, field):
    address = tl.load(addresses + head * NUM_ADDRESSES + field)
    return tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 16)


@triton.jit
def _biases(addresses, head, field):
    return tl.load(addresses + head * NUM_ADDRESSES + field).to(tl.pointer_type(tl.float32))


@triton.jit
def _ids(addresses, head, field):
    return tl.load(addresses + head * NUM_ADDRESSES + field).to(tl.pointer_type(tl.int32))


@triton.jit
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def _part(acc, a, rows, row_mask, b, k_stride, n, n_mask, size, k_start, BLOCK_K: tl.constexpr):
    """acc + the products of one block of a[rows, :size] @ b[:size, n]; `rows` are offsets of a's rows."""
    k = k_start + tl.arange(0, BLOCK_K)
    k_mask = k < size
    a_tile = tl.load(a + rows[:, None] + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
    b_tile = tl.load(b + k[:, None] * k_stride + n[None, :], mask=k_mask[:, None] & n_mask[None, :], other=0.0)
    # The state keeps its fp32 bits: heads are small, and the host computes them so.
    return tl.dot(a_tile.to(tl.float32), b_tile.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def _product(acc, a, rows, row_mask, b, k_stride, n, n_mask, size, BLOCK_K: tl.constexpr):
    """acc + a[rows, :size] @ b[:size, n], k ascending."""
    for k_start in range(0, size, BLOCK_K):
        acc = _part(acc, a, rows, row_mask, b, k_stride, n, n_mask, size, k_start, BLOCK_K)
    return acc


@triton.jit
def _followed(prompt, position, length, window, jump_start, token, WIDTH: tl.constexpr):
    """Pointer and move after `token`: just behind its first place among the next `window` tokens of the prompt.

    Else behind its first place from `jump_start` on, but not behind the prompt's last token; -1: it does not jump.
    """
    idx = tl.arange(0, WIDTH)
    is_seen = (idx < window) & (position + idx < length)
    seen = tl.load(prompt + position + idx, mask=is_seen, other=-1)
    found = tl.min(tl.where(is_seen & (seen == token), idx, WIDTH), axis=0)
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
def walk_pointers(
    input_tokens, moves, draft_positions, positions, prompt_tokens, prompt_lens, seats, head_ids,
    first_rows, num_accepted, last_row, sampled, addresses, sizes, prompt_stride, WIDTH: tl.constexpr,
):  # fmt: skip
    """Grid (sequences): follow the tokens that were kept; leave the newest of them as the loop's first input."""
    seq = tl.program_id(0)
    seat, head = tl.load(seats + seq), tl.load(head_ids + seq)
    if (seat >= 0) & (head >= 0) & (tl.load(last_row + seq) >= 0):
        first, num = tl.load(first_rows + seq), tl.load(num_accepted + seq) + 1
        prompt = prompt_tokens + seat.to(tl.int64) * prompt_stride
        position, length, window = tl.load(positions + seat), tl.load(prompt_lens + seat), _size(sizes, head, WINDOW)
        jump_start = _size(sizes, head, JUMP_START)
        for idx in range(0, num):
            token = tl.load(sampled + first + idx).to(tl.int32)
            position, moved = _followed(prompt, position, length, window, jump_start, token, WIDTH)
            if idx == num - 1:
                tl.store(moves + seq, moved)
                tl.store(input_tokens + seq, tl.load(_ids(addresses, head, LOCAL_OF) + token))
        tl.store(positions + seat, position)
        tl.store(draft_positions + seq, position)


@triton.jit
def begin_states(
    partials, squares, hidden, tapped, last_row, tiles, addresses, sizes,
    hidden_size, hidden_stride, tapped_stride, tap_stride, num_seqs, state_stride, chunks_a_half,
    IS_BF16: tl.constexpr, CHUNK: tl.constexpr,
    TILE_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, column blocks, chunks of both halves): parts of the first product, before normalisation."""
    tile = tiles + tl.program_id(0) * 3
    first, end, head = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if head >= 0:
        d = _state_size(sizes, head)
        if tl.program_id(1) * BLOCK_N < d:
            part = tl.program_id(2)
            half, start = part // chunks_a_half, part % chunks_a_half * CHUNK
            seqs = first + tl.arange(0, TILE_ROWS)
            rows = tl.load(last_row + seqs, mask=seqs < end, other=-1)
            row_mask = rows >= 0
            rows = tl.maximum(rows, 0).to(tl.int64)
            n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
            weight = _weights(addresses, head, INIT_WEIGHT) + half.to(tl.int64) * hidden_size * d
            of_hidden = tl.where(half == 0, hidden_size, 0)  # columns read of either
            of_tapped = hidden_size - of_hidden
            tap = _size(sizes, head, TAP).to(tl.int64) * tap_stride
            acc = tl.zeros((TILE_ROWS, BLOCK_N), dtype=tl.float32)
            total = tl.zeros((TILE_ROWS,), dtype=tl.float32)
            for k_start in range(start, start + CHUNK, BLOCK_K):
                k = k_start + tl.arange(0, BLOCK_K)
                x_mask = row_mask[:, None] & (k < of_hidden)[None, :]
                y_mask = row_mask[:, None] & (k < of_tapped)[None, :]
                x = tl.load(hidden + rows[:, None] * hidden_stride + k[None, :], mask=x_mask, other=0.0)
                y = tl.load(tapped + tap + rows[:, None] * tapped_stride + k[None, :], mask=y_mask, other=0.0)
                x = tl.where(y_mask, y, x)
                k_mask = k < hidden_size
                w = tl.load(weight + k[:, None] * d + n[None, :], mask=k_mask[:, None] & (n < d)[None, :], other=0.0)
                if not IS_BF16:
                    x, w = x.to(tl.float32), w.to(tl.float32)
                acc = tl.dot(x, w, acc, input_precision="ieee")
                wide = x.to(tl.float32)
                total += tl.sum(wide * wide, axis=1)
            target = partials + (part * num_seqs + seqs[:, None]).to(tl.int64) * state_stride + n[None, :]
            tl.store(target, acc, mask=(seqs < end)[:, None] & (n < d)[None, :])
            if tl.program_id(1) == 0:
                tl.store(squares + part * num_seqs + seqs, total, mask=seqs < end)


@triton.jit
def finish_states(
    state, partials, squares, head_ids, last_row, addresses, sizes,
    hidden_size, num_seqs, state_stride, chunks_a_half, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, column blocks): tanh of both halves, each normalised, and the bias."""
    seq, head = tl.program_id(0), tl.load(head_ids + tl.program_id(0))
    if (head >= 0) & (tl.load(last_row + seq) >= 0):
        d = _state_size(sizes, head)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.load(_biases(addresses, head, INIT_BIAS) + n, mask=n < d, other=0.0)
        for half in range(0, 2):
            product = tl.zeros((BLOCK_N,), dtype=tl.float32)
            square = 0.0
            for chunk in range(0, chunks_a_half):
                place = (half * chunks_a_half + chunk) * num_seqs + seq
                product += tl.load(partials + place.to(tl.int64) * state_stride + n, mask=n < d, other=0.0)
                square += tl.load(squares + place)
            total += product / tl.sqrt(square / hidden_size + 1e-6)
        tl.store(state + seq.to(tl.int64) * state_stride + n, _tanh(total), mask=n < d)


@triton.jit
def feed(
    x, input_tokens, moves, draft_positions, prompt_local, prompt_lens, seats, tiles, addresses, sizes,
    prompt_stride, state_stride, position_idx,
    TILE_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, column blocks): the cell's input, of the token, the move, and the token at the pointer."""
    tile = tiles + tl.program_id(0) * 3
    first, end, head = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if head >= 0:
        d = _state_size(sizes, head)
        if (tl.program_id(1) * BLOCK_N < d) & (position_idx < _size(sizes, head, DRAFT_LEN)):
            seqs = first + tl.arange(0, TILE_ROWS)
            own_seats = tl.load(seats + seqs, mask=seqs < end, other=-1)
            row_mask = own_seats >= 0
            own_seats = tl.maximum(own_seats, 0)
            pointer = tl.load(draft_positions + seqs, mask=row_mask, other=0)
            length = tl.load(prompt_lens + own_seats, mask=row_mask, other=0)
            # Nothing at the pointer reads as token 0, no window at all as "another token": so heads are trained.
            following = tl.load(
                prompt_local + own_seats.to(tl.int64) * prompt_stride + pointer,
                mask=row_mask & (pointer < length),
                other=0,
            )
            if _size(sizes, head, WINDOW) == 0:
                following = tl.zeros_like(following) + _size(sizes, head, NUM_TOKENS)
            n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
            n_mask = n < d
            mask = row_mask[:, None] & n_mask[None, :]
            token = tl.load(input_tokens + seqs, mask=row_mask, other=0)
            moved = tl.load(moves + seqs, mask=row_mask, other=0)
            embed = _weights(addresses, head, EMBED)
            of_token = tl.load(embed + token.to(tl.int64)[:, None] * d + n[None, :], mask=mask, other=0.0)
            of_move = tl.load(_weights(addresses, head, MOVES) + moved[:, None] * d + n[None, :], mask=mask, other=0.0)
            acc = of_token.to(tl.float32) + of_move.to(tl.float32)
            weight = _weights(addresses, head, NEXT_WEIGHT)
            acc = _product(acc, embed, following.to(tl.int64) * d, row_mask, weight, d, n, n_mask, d, BLOCK_K)
            tl.store(x + seqs.to(tl.int64)[:, None] * state_stride + n[None, :], acc, mask=mask)


@triton.jit
def step_cells(
    new_state, state, x, last_row, tiles, addresses, sizes, state_stride, position_idx,
    TILE_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, column blocks): the GRU cell."""
    tile = tiles + tl.program_id(0) * 3
    first, end, head = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if head >= 0:
        d = _state_size(sizes, head)
        if (tl.program_id(1) * BLOCK_N < d) & (position_idx < _size(sizes, head, DRAFT_LEN)):
            seqs = first + tl.arange(0, TILE_ROWS)
            row_mask = tl.load(last_row + seqs, mask=seqs < end, other=-1) >= 0
            rows = seqs.to(tl.int64) * state_stride
            n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
            n_mask = n < d
            gates_x, gates_s = _weights(addresses, head, GATES_X), _weights(addresses, head, GATES_S)
            bias = _biases(addresses, head, GATES_BIAS)
            reset = tl.zeros((TILE_ROWS, BLOCK_N), dtype=tl.float32)
            update = tl.zeros((TILE_ROWS, BLOCK_N), dtype=tl.float32)
            from_x = tl.zeros((TILE_ROWS, BLOCK_N), dtype=tl.float32)
            from_s = tl.zeros((TILE_ROWS, BLOCK_N), dtype=tl.float32)
            for k_start in range(0, d, BLOCK_K):
                reset = _part(reset, x, rows, row_mask, gates_x, 3 * d, n, n_mask, d, k_start, BLOCK_K)
                update = _part(update, x, rows, row_mask, gates_x + d, 3 * d, n, n_mask, d, k_start, BLOCK_K)
                from_x = _part(from_x, x, rows, row_mask, gates_x + 2 * d, 3 * d, n, n_mask, d, k_start, BLOCK_K)
                reset = _part(reset, state, rows, row_mask, gates_s, 3 * d, n, n_mask, d, k_start, BLOCK_K)
                update = _part(update, state, rows, row_mask, gates_s + d, 3 * d, n, n_mask, d, k_start, BLOCK_K)
                from_s = _part(from_s, state, rows, row_mask, gates_s + 2 * d, 3 * d, n, n_mask, d, k_start, BLOCK_K)
            reset = tl.sigmoid(reset + tl.load(bias + n, mask=n_mask, other=0.0)[None, :])
            update = tl.sigmoid(update + tl.load(bias + d + n, mask=n_mask, other=0.0)[None, :])
            from_x += tl.load(bias + 2 * d + n, mask=n_mask, other=0.0)[None, :]
            from_s += tl.load(_biases(addresses, head, CANDIDATE_BIAS) + n, mask=n_mask, other=0.0)[None, :]
            candidate = _tanh(from_x + reset * from_s)
            mask = row_mask[:, None] & n_mask[None, :]
            old = tl.load(state + rows[:, None] + n[None, :], mask=mask, other=0.0)
            tl.store(new_state + rows[:, None] + n[None, :], candidate + update * (old - candidate), mask=mask)


@triton.jit
def make_queries(
    queries, entry_scores, state, last_row, tiles, addresses, sizes, num_seqs, state_stride, entry_stride, position_idx,
    TILE_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, column blocks, 3): queries on the vocabulary and on the window's tokens, biases of its entries."""
    tile = tiles + tl.program_id(0) * 3
    first, end, head = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    which = tl.program_id(2)
    if head >= 0:
        d, window = _state_size(sizes, head), _size(sizes, head, WINDOW)
        size = tl.where(which == 2, window, tl.where((which == 1) & (window == 0), 0, d))
        if (tl.program_id(1) * BLOCK_N < size) & (position_idx < _size(sizes, head, DRAFT_LEN)):
            seqs = first + tl.arange(0, TILE_ROWS)
            row_mask = tl.load(last_row + seqs, mask=seqs < end, other=-1) >= 0
            rows = seqs.to(tl.int64)
            n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
            n_mask = n < size
            weight = _weights(addresses, head, OUT_WEIGHT + which)  # out, copy, slot: neighbours in the table
            acc = tl.zeros((TILE_ROWS, BLOCK_N), dtype=tl.float32)
            stride = tl.multiple_of(tl.where(which == 2, (window + 15) // 16 * 16, d), 16)
            acc = _product(acc, state, rows * state_stride, row_mask, weight, stride, n, n_mask, d, BLOCK_K)
            mask = row_mask[:, None] & n_mask[None, :]
            if which == 2:
                bias = tl.load(_biases(addresses, head, SLOT_BIAS) + n, mask=n_mask, other=0.0)
                tl.store(entry_scores + rows[:, None] * entry_stride + n[None, :], acc + bias[None, :], mask=mask)
            else:
                target = queries + (which * num_seqs + rows[:, None]) * state_stride + n[None, :]
                tl.store(target, acc, mask=mask)


@triton.jit
def score_tokens(
    scores, queries, last_row, tiles, addresses, sizes, state_stride, score_stride, position_idx,
    TILE_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, vocabulary blocks): logits of the task vocabulary and of "another token"."""
    tile = tiles + tl.program_id(0) * 3
    first, end, head = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if head >= 0:
        d, size = _state_size(sizes, head), _size(sizes, head, NUM_TOKENS) + 1
        if (tl.program_id(1) * BLOCK_N < size) & (position_idx < _size(sizes, head, DRAFT_LEN)):
            seqs = first + tl.arange(0, TILE_ROWS)
            row_mask = tl.load(last_row + seqs, mask=seqs < end, other=-1) >= 0
            rows = seqs.to(tl.int64)
            n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
            n_mask = n < size
            acc = tl.zeros((TILE_ROWS, BLOCK_N), dtype=tl.float32)
            embed = _weights(addresses, head, EMBED)
            acc = _product(
                acc, queries, rows * state_stride, row_mask, embed, 1, n.to(tl.int64) * d, n_mask, d, BLOCK_K
            )
            acc += tl.load(_biases(addresses, head, OUT_BIAS) + n, mask=n_mask, other=0.0)[None, :]
            target = scores + rows[:, None] * score_stride + n[None, :]
            tl.store(target, acc, mask=row_mask[:, None] & n_mask[None, :])


@triton.jit
def choose(
    guesses, probabilities, input_tokens, moves, draft_positions, scores, entry_scores, copy_queries,
    prompt_tokens, prompt_local, prompt_lens, seats, head_ids, last_row, addresses, sizes,
    prompt_stride, state_stride, score_stride, entry_stride, guess_stride, position_idx,
    WIDTH: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (sequences): the most likely choice of vocabulary and window, and the next input that it makes."""
    seq = tl.program_id(0)
    seat, head = tl.load(seats + seq), tl.load(head_ids + seq)
    goes_on = (seat >= 0) & (head >= 0) & (tl.load(last_row + seq) >= 0)
    line = guesses + seq * guess_stride + position_idx
    if position_idx > 0:
        goes_on = goes_on & (tl.load(line - 1) >= 0)
    if goes_on:
        goes_on = position_idx < _size(sizes, head, DRAFT_LEN)
    tl.store(line, -1)
    tl.store(probabilities + seq * guess_stride + position_idx, 0.0)
    if goes_on:
        d, num_tokens, window = (
            _state_size(sizes, head), _size(sizes, head, NUM_TOKENS), _size(sizes, head, WINDOW),
        )  # fmt: skip
        pointer, length = tl.load(draft_positions + seq), tl.load(prompt_lens + seat)
        prompt = seat.to(tl.int64) * prompt_stride
        idx = tl.arange(0, WIDTH)
        is_filled = (idx < window) & (pointer + idx < length)
        local = tl.load(prompt_local + prompt + pointer + idx, mask=is_filled, other=-1)  # [W]
        embed = _weights(addresses, head, EMBED)
        match = tl.zeros((WIDTH,), dtype=tl.float32)
        for k_start in range(0, d, BLOCK_K):
            k = k_start + tl.arange(0, BLOCK_K)
            query = tl.load(
                copy_queries + seq.to(tl.int64) * state_stride + k, mask=k < tl.where(window > 0, d, 0), other=0.0
            )
            keys = tl.load(
                embed + tl.maximum(local, 0).to(tl.int64)[:, None] * d + k[None, :],
                mask=is_filled[:, None] & (k < d)[None, :], other=0.0,
            )  # fmt: skip
            match += tl.sum(keys.to(tl.float32) * query[None, :], axis=1)
        entry_score = tl.load(entry_scores + seq * entry_stride + idx, mask=is_filled, other=0.0)
        entry_score = tl.where(
            is_filled, entry_score + match / tl.sqrt(_size(sizes, head, KEY_SIZE).to(tl.float32)), float("-inf")
        )  # [W]

        of_seq = scores + seq.to(tl.int64) * score_stride
        top = tl.max(entry_score, axis=0)
        best, token = tl.full((), float("-inf"), tl.float32), tl.full((), 0, tl.int32)
        for start in range(0, num_tokens, BLOCK_U):
            u = start + tl.arange(0, BLOCK_U)
            score = tl.load(of_seq + u, mask=u < num_tokens, other=float("-inf"))
            here = tl.max(score, axis=0)
            token = tl.where(here > best, tl.min(tl.where(score == here, u, num_tokens), axis=0), token)
            best = tl.maximum(best, here)
        top = tl.maximum(tl.maximum(top, best), tl.load(of_seq + num_tokens))
        total = tl.sum(tl.where(is_filled, tl.exp(entry_score - top), 0.0), axis=0)
        for start in range(0, num_tokens + 1, BLOCK_U):
            u = start + tl.arange(0, BLOCK_U)
            score = tl.load(of_seq + u, mask=u <= num_tokens, other=float("-inf"))
            total += tl.sum(tl.exp(score - top), axis=0)

        entry_prob = tl.where(is_filled, tl.exp(entry_score - top) / total, 0.0)  # [W]
        is_known = is_filled & (local < num_tokens)
        own = tl.load(of_seq + tl.maximum(local, 0), mask=is_known, other=float("-inf"))
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
        if (total > 0.0) & (prob >= 0.0):  # NaN is neither: the head then has nothing to say
            of_vocab = tl.load(_ids(addresses, head, TOKEN_OF) + token)
            of_prompt = tl.load(prompt_tokens + prompt + pointer + copied_idx, mask=copies, other=0)
            guess = tl.where(copies, of_prompt, of_vocab)
            tl.store(line, guess)
            tl.store(probabilities + seq * guess_stride + position_idx, tl.minimum(prob, 1.0))
            jump_start = _size(sizes, head, JUMP_START)
            pointer, moved = _followed(prompt_tokens + prompt, pointer, length, window, jump_start, guess, WIDTH)
            tl.store(input_tokens + seq, tl.where(copies, num_tokens, token))
            tl.store(moves + seq, moved)
            tl.store(draft_positions + seq, pointer)
