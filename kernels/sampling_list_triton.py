"""Triton kernels of sampling from a list: what top-k or top-p can leave is gathered once, and cut and drawn from there.

Two passes over the logits: a histogram of how far tokens lie below the best one, and the list of those above the bin
below which no cut can lie, in vocabulary order. Then one program a row bisects over its list. A row whose list has no
room, or that cuts nothing, is left to the kernels of sampling_triton.py; sampling.py launches both.
Invariant: a row's list and sums depend on its own logits and parameters alone, and every sum has a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sampling_triton import _cuts, _place, _scaled, _weight

BINS: tl.constexpr = tl.constexpr(64)
_WIDTH: tl.constexpr = tl.constexpr(0.5)  # of a bin, in units of x: weights within one differ by less than 1.65


@triton.jit
def _bin(x, top):
    """How many widths x lies below the top, at most the last bin; all else than the top where that is infinite."""
    return tl.where(x == top, 0.0, tl.minimum((top - x) / _WIDTH, BINS - 1.0)).to(tl.int32)


@triton.jit
def _cuts_anything(temperature, top_k, top_p, vocab_size, is_bad):
    cuts = _cuts(temperature, top_k, top_p, vocab_size, True) | _cuts(temperature, top_k, top_p, vocab_size, False)
    return cuts & (is_bad == 0)


@triton.jit
def tally(
    counts, masses, logits, masks, row_top, bad, temperatures, top_ks, top_ps, mask_rows, vocab_size, row_stride,
    mask_stride, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks): how many of the block's tokens are in each bin, and their mass."""
    row, block = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    is_bad = tl.load(bad + row)
    if _cuts_anything(temperature, tl.load(top_ks + row), tl.load(top_ps + row), vocab_size, is_bad):
        line, top, mask_row = logits + row.to(tl.int64) * row_stride, tl.load(row_top + row), tl.load(mask_rows + row)
        found = tl.zeros((BINS,), dtype=tl.int32)
        mass = tl.zeros((PART,), dtype=tl.float64)
        for start in range(0, BLOCK, PART):
            tokens = block * BLOCK + start + tl.arange(0, PART)
            valid = tokens < vocab_size
            x = _scaled(line, masks, mask_row, mask_stride, temperature, tokens, valid)
            mass += tl.where(valid, _weight(x, top), 0.0)
            found += tl.histogram(_bin(x, top), BINS)
        bins = tl.arange(0, BINS)
        beyond = tl.maximum((block + 1) * BLOCK - vocab_size, 0)  # no tokens, counted as the least likely
        place = row * tl.num_programs(1) + block
        tl.store(counts + place * BINS + bins, found - tl.where(bins == BINS - 1, beyond, 0))
        tl.store(masses + place, tl.sum(mass, axis=0))


@triton.jit
def gather(
    list_x, list_token, list_size, row_mass, counts, masses, logits, masks, row_top, bad, temperatures, top_ks,
    top_ps, mask_rows, vocab_size, row_stride, mask_stride, num_blocks, num_places,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks): the row's tokens down to the last bin that a cut can leave something of, if there is room.

    Of top-k that is the bin of the kth token, else the first below which at most what top-p may drop can lie. A size
    beyond `num_places` means that there is no list.
    """
    row, block = tl.program_id(0), tl.program_id(1)
    temperature, top_k, top_p = tl.load(temperatures + row), tl.load(top_ks + row), tl.load(top_ps + row)
    if _cuts_anything(temperature, top_k, top_p, vocab_size, tl.load(bad + row)):
        top = tl.load(row_top + row)
        blocks, bins = tl.arange(0, BLOCKS), tl.arange(0, BINS)
        is_block = blocks < num_blocks
        found = tl.load(
            counts + (row * num_blocks + blocks)[:, None] * BINS + bins[None, :], mask=is_block[:, None], other=0
        )  # [blocks, bins]
        total = tl.sum(tl.load(masses + row * num_blocks + blocks, mask=is_block, other=0.0), axis=0)
        of_bins = tl.sum(found, axis=0)
        most = of_bins.to(tl.float64) * tl.exp(-bins.to(tl.float64) * _WIDTH)  # a bin's mass is no larger
        above = tl.cumsum(of_bins, axis=0)  # tokens in this bin or nearer to the top
        below = tl.sum(most, axis=0) - tl.cumsum(most, axis=0)
        # A bit more than what rounding may add to `below` and take from the list.
        spare = (1.0 - top_p - 1e-9) * total
        is_enough = below <= spare
        if _cuts(temperature, top_k, top_p, vocab_size, True):
            is_enough = above >= top_k
        level = tl.min(tl.where(is_enough, bins, BINS - 1), axis=0)
        size = tl.sum(tl.where(bins <= level, of_bins, 0), axis=0)
        if block == 0:
            tl.store(list_size + row, size)
            tl.store(row_mass + row, total)
        if size <= num_places:
            is_before = (blocks < block)[:, None] & (bins <= level)[None, :]
            base = tl.sum(tl.sum(tl.where(is_before, found, 0), axis=1), axis=0)
            tokens = block * BLOCK + tl.arange(0, BLOCK)
            valid = tokens < vocab_size
            line = logits + row.to(tl.int64) * row_stride
            x = _scaled(line, masks, tl.load(mask_rows + row), mask_stride, temperature, tokens, valid)
            takes = valid & (_bin(x, top) <= level)
            target = row.to(tl.int64) * num_places + base + tl.cumsum(takes.to(tl.int32), axis=0) - 1
            tl.store(list_x + target, x, mask=takes)
            tl.store(list_token + target, tokens, mask=takes)


@triton.jit
def choose(
    sampled, is_done, list_x, list_token, list_size, row_mass, row_top, bad, temperatures, top_ks, top_ps, min_ps,
    uniforms, vocab_size, PLACES: tl.constexpr,
):  # fmt: skip
    """Grid (rows): exact cuts by bisection on the bits, then the draw; marks the row as done."""
    row = tl.program_id(0)
    temperature, top_k, top_p = tl.load(temperatures + row), tl.load(top_ks + row), tl.load(top_ps + row)
    if _cuts_anything(temperature, top_k, top_p, vocab_size, tl.load(bad + row)):
        size = tl.load(list_size + row)
        if size <= PLACES:
            top = tl.load(row_top + row)
            index = tl.arange(0, PLACES)
            valid = index < size
            x = tl.load(list_x + row.to(tl.int64) * PLACES + index, mask=valid, other=float("-inf"))
            place = _place(x)
            mass = tl.where(valid, _weight(x, top), 0.0)
            lowest = tl.min(tl.where(valid, place, 2147483647), axis=0)
            total = tl.load(row_mass + row)
            if _cuts(temperature, top_k, top_p, vocab_size, True):
                low, high = lowest, _place(top)
                while low < high:  # the largest bound that still has top_k tokens at or above it
                    middle = _middle(low, high)
                    is_enough = tl.sum((valid & (place >= middle)).to(tl.int32), axis=0) >= top_k
                    low = tl.where(is_enough, middle, low)
                    high = tl.where(is_enough, high, middle - 1)
                mass = tl.where(place >= low, mass, 0.0)
                total = tl.sum(mass, axis=0)
            if _cuts(temperature, top_k, top_p, vocab_size, False):
                goal = top_p * total
                low, high = lowest, _place(top)
                while low < high:
                    middle = _middle(low, high)
                    is_enough = tl.sum(tl.where(place >= middle, mass, 0.0), axis=0) >= goal
                    low = tl.where(is_enough, middle, low)
                    high = tl.where(is_enough, high, middle - 1)
                mass = tl.where(place >= low, mass, 0.0)
            mass = tl.where(mass >= tl.load(min_ps + row), mass, 0.0)
            sums = tl.cumsum(mass, axis=0)
            target = tl.load(uniforms + row) * tl.max(sums, axis=0)
            last = tl.max(tl.where(mass > 0.0, index, 0), axis=0)
            picked = tl.min(tl.where((mass > 0.0) & (sums > target), index, last), axis=0)
            tl.store(sampled + row, tl.load(list_token + row.to(tl.int64) * PLACES + picked).to(tl.int64))
            tl.store(is_done + row, 1)


@triton.jit
def _middle(low, high):
    """Of two places, rounded up; their distance may not fit 32 bits."""
    return ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)
