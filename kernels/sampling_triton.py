"""Triton kernels of sampling: every row of logits is split over programs, and what they found is combined by the next.

sampling.py launches these and states what they compute. No program waits
for another: one launch leaves partial results of its blocks, the next combines them, each program for itself.
Rows that were drawn from their lists (sampling_list_triton.py) are done and leave at once.
Invariant: a row's token depends on its own logits and parameters alone, and every sum has a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

WAYS: tl.constexpr = tl.constexpr(16)  # a pass of the bisection tests 16 bounds, which is 4 bits of 32
_LEAST = tl.constexpr(-2147483648)  # below every number's place in order


@triton.jit
def _masked(x, masks, mask_row, mask_stride, tokens, valid):
    """x with -inf at the tokens that the row's mask forbids; a row without mask passes as it is."""
    if mask_row >= 0:
        word = tl.load(masks + mask_row.to(tl.int64) * mask_stride + tokens // 32, mask=valid, other=0)
        x = tl.where(((word >> (tokens % 32)) & 1) != 0, x, float("-inf"))
    return x


@triton.jit
def _scaled(logits, masks, mask_row, mask_stride, temperature, tokens, valid):
    """Logits after mask and temperature; `logits` points at the row."""
    x = tl.load(logits + tokens, mask=valid, other=float("-inf"))
    return tl.div_rn(_masked(x, masks, mask_row, mask_stride, tokens, valid), temperature)


@triton.jit
def _place(x):
    """The place of fp32 numbers in order, as int32: x < y if and only if _place(x) < _place(y)."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # both zeros are one number
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _weight(x, top):
    """exp(x - top) in fp64; 1 at the top even if that is infinite."""
    return tl.where(x == top, 1.0, tl.exp(x.to(tl.float64) - top.to(tl.float64)))


@triton.jit
def best_of_blocks(
    block_best, block_token, block_nan, logits, masks, mask_rows, vocab_size, row_stride, mask_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks): each block's largest allowed logit, its lowest token, and whether a logit is NaN."""
    row, block = tl.program_id(0), tl.program_id(1)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    valid = tokens < vocab_size
    x = tl.load(logits + row.to(tl.int64) * row_stride + tokens, mask=valid, other=float("-inf"))
    is_nan = x != x
    x = _masked(tl.where(is_nan, float("-inf"), x), masks, tl.load(mask_rows + row), mask_stride, tokens, valid)
    best = tl.max(x, axis=0)
    place = row * tl.num_programs(1) + block
    tl.store(block_best + place, best)
    tl.store(block_token + place, tl.min(tl.where(x == best, tokens, vocab_size), axis=0))
    tl.store(block_nan + place, tl.max(is_nan.to(tl.int32), axis=0))


@triton.jit
def best_of_rows(
    sampled, bad, row_top, thresholds, is_done, block_best, block_token, block_nan, temperatures, num_blocks,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (rows): the greedy token, the flag, and what drawing starts from."""
    row = tl.program_id(0)
    blocks = tl.arange(0, BLOCKS)
    valid = blocks < num_blocks
    bests = tl.load(block_best + row * num_blocks + blocks, mask=valid, other=float("-inf"))
    firsts = tl.load(block_token + row * num_blocks + blocks, mask=valid, other=2147483647)
    nan = tl.max(tl.load(block_nan + row * num_blocks + blocks, mask=valid, other=0), axis=0)
    best = tl.max(bests, axis=0)
    token = tl.min(tl.where(bests == best, firsts, 2147483647), axis=0)
    is_bad = (nan > 0) | (best == float("-inf"))
    tl.store(sampled + row, tl.where(is_bad, 0, token).to(tl.int64))
    tl.store(bad + row, tl.where(nan > 0, 1, tl.where(is_bad, 2, 0)))
    temperature = tl.load(temperatures + row)
    tl.store(row_top + row, tl.div_rn(best, tl.where(temperature > 0.0, temperature, 1.0)))
    tl.store(thresholds + row, tl.full((), _LEAST, tl.int32))
    tl.store(is_done + row, 0)


@triton.jit
def _narrowed(partials, bound, step, goal, num_blocks, BLOCKS: tl.constexpr):
    """The largest of the 16 bounds that a pass tested, bound + way * step, above which `goal` still is reached."""
    blocks, ways = tl.arange(0, BLOCKS), tl.arange(0, WAYS)
    found = tl.load(
        partials + blocks[:, None] * WAYS + ways[None, :], mask=(blocks < num_blocks)[:, None], other=0.0
    )  # [blocks, ways]
    return bound + tl.max(tl.where(tl.sum(found, axis=0) >= goal, ways, 0), axis=0) * step


@triton.jit
def _goal_of_mass(partials, top_p, num_blocks, BLOCKS: tl.constexpr):
    """top_p of all mass, which the lowest bound of the first pass has above it."""
    blocks = tl.arange(0, BLOCKS)
    return top_p * tl.sum(tl.load(partials + blocks * WAYS, mask=blocks < num_blocks, other=0.0), axis=0)


@triton.jit
def _cuts(temperature, top_k, top_p, vocab_size, COUNTS: tl.constexpr):
    if COUNTS:
        cuts = (top_k > 0) & (top_k < vocab_size)
    else:
        cuts = top_p < 1.0
    return cuts & (temperature > 0.0)


@triton.jit
def narrow(
    partials, old_partials, bounds, old_bounds, goals, thresholds, row_top, logits, masks,
    temperatures, top_ks, top_ps, mask_rows, is_done, vocab_size, row_stride, mask_stride, pass_idx, step,
    COUNTS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks): one pass of the bisection of top-k (COUNTS) or top-p.

    Reads what the pass before found, which leaves 16 bounds `step` apart, and writes for each of them how many tokens
    of the block, or how much of their mass, lie at or above it. Rows without such a parameter leave at once.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    num_blocks = tl.num_programs(1)
    temperature, top_k, top_p = tl.load(temperatures + row), tl.load(top_ks + row), tl.load(top_ps + row)
    if _cuts(temperature, top_k, top_p, vocab_size, COUNTS) & (tl.load(is_done + row) == 0):
        bound = tl.full((), _LEAST, tl.int32)
        if pass_idx > 0:
            found = old_partials + row * num_blocks * WAYS
            if COUNTS:
                goal = top_k.to(tl.float64)
            else:
                goal = tl.load(goals + row)
                if pass_idx == 1:
                    goal = _goal_of_mass(found, top_p, num_blocks, BLOCKS)
            bound = _narrowed(found, tl.load(old_bounds + row), step * WAYS, goal, num_blocks, BLOCKS)
            if not COUNTS:
                if (pass_idx == 1) & (block == 0):
                    tl.store(goals + row, goal)
        if block == 0:
            tl.store(bounds + row, bound)
        ways = tl.arange(0, WAYS)
        tested = bound + ways * step  # [ways]
        line = logits + row.to(tl.int64) * row_stride
        mask_row, top, threshold = tl.load(mask_rows + row), tl.load(row_top + row), tl.load(thresholds + row)
        if COUNTS:
            sums = tl.zeros((PART, WAYS), dtype=tl.int32)
        else:
            sums = tl.zeros((PART, WAYS), dtype=tl.float64)
        for start in range(0, BLOCK, PART):
            tokens = block * BLOCK + start + tl.arange(0, PART)
            valid = tokens < vocab_size
            x = _scaled(line, masks, mask_row, mask_stride, temperature, tokens, valid)
            place = _place(x)
            is_above = (place[:, None] >= tested[None, :]) & valid[:, None]
            if COUNTS:
                sums += is_above.to(tl.int32)
            else:
                weight = tl.where(place >= threshold, _weight(x, top), 0.0)
                sums += tl.where(is_above, weight[:, None], 0.0)
        target = partials + (row * num_blocks + block) * WAYS + ways
        tl.store(target, tl.sum(sums, axis=0).to(tl.float64))


@triton.jit
def settle(
    thresholds, goals, partials, bounds, row_top, temperatures, top_ks, top_ps, is_done, vocab_size, num_blocks,
    COUNTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (rows): the threshold that the last pass found, on top of the one there is."""
    row = tl.program_id(0)
    top_k, top_p = tl.load(top_ks + row), tl.load(top_ps + row)
    if _cuts(tl.load(temperatures + row), top_k, top_p, vocab_size, COUNTS) & (tl.load(is_done + row) == 0):
        if COUNTS:
            goal = top_k.to(tl.float64)
        else:
            goal = tl.load(goals + row)
        found = _narrowed(partials + row * num_blocks * WAYS, tl.load(bounds + row), 1, goal, num_blocks, BLOCKS)
        found = tl.minimum(found, _place(tl.load(row_top + row)))  # the most likely token always stays
        tl.store(thresholds + row, tl.maximum(tl.load(thresholds + row), found))


@triton.jit
def _kept_weights(x, valid, top, threshold, min_p):
    weights = _weight(x, top)
    return tl.where(valid & (_place(x) >= threshold) & (weights >= min_p), weights, 0.0)


@triton.jit
def weigh_blocks(
    block_mass, thresholds, row_top, logits, masks, temperatures, min_ps, mask_rows, is_done,
    vocab_size, row_stride, mask_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks): mass of the block's tokens that are left, in units of the most likely token's."""
    row, block = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    if (temperature > 0.0) & (tl.load(is_done + row) == 0):
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        valid = tokens < vocab_size
        line = logits + row.to(tl.int64) * row_stride
        x = _scaled(line, masks, tl.load(mask_rows + row), mask_stride, temperature, tokens, valid)
        weights = _kept_weights(x, valid, tl.load(row_top + row), tl.load(thresholds + row), tl.load(min_ps + row))
        tl.store(block_mass + row * tl.num_programs(1) + block, tl.sum(weights, axis=0))


@triton.jit
def draw(
    sampled, bad, block_mass, thresholds, row_top, logits, masks, temperatures, min_ps, uniforms, mask_rows, is_done,
    vocab_size, num_blocks, row_stride, mask_stride, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (rows): the first token, in vocabulary order, up to which more than `uniform` of the mass lies."""
    row = tl.program_id(0)
    temperature = tl.load(temperatures + row)
    if (temperature > 0.0) & (tl.load(bad + row) == 0) & (tl.load(is_done + row) == 0):
        blocks = tl.arange(0, BLOCKS)
        masses = tl.load(block_mass + row * num_blocks + blocks, mask=blocks < num_blocks, other=0.0)
        sums = tl.cumsum(masses, axis=0)
        target = tl.load(uniforms + row) * tl.max(sums, axis=0)
        # Rounding must never lead to a block or a token without mass: only those with some are looked at, and the last
        # of them stands in when no sum is above the target.
        last = tl.max(tl.where(masses > 0.0, blocks, 0), axis=0)
        block = tl.min(tl.where((masses > 0.0) & (sums > target), blocks, last), axis=0)
        before = tl.sum(tl.where(blocks < block, masses, 0.0), axis=0)
        tokens = block * BLOCK + tl.arange(0, BLOCK)
        valid = tokens < vocab_size
        line = logits + row.to(tl.int64) * row_stride
        x = _scaled(line, masks, tl.load(mask_rows + row), mask_stride, temperature, tokens, valid)
        weights = _kept_weights(x, valid, tl.load(row_top + row), tl.load(thresholds + row), tl.load(min_ps + row))
        last_token = tl.max(tl.where(weights > 0.0, tokens, 0), axis=0)
        is_past = (before + tl.cumsum(weights, axis=0) > target) & (weights > 0.0)
        tl.store(sampled + row, tl.min(tl.where(is_past, tokens, last_token), axis=0).to(tl.int64))
