"""Sampling on the device: one token from every row of logits, with each row's own parameters.

Semantics, for row r with uniform number u in [0, 1): tokens that the row's mask forbids are -inf. Temperature 0: the
largest logit, of equals the lowest token. Else x = logits / temperature in fp32 and in this order: top-k (tokens equal
to the kth stay), top-p (the largest v such that tokens with x >= v have top_p of the mass; equals stay or go together),
min-p, and the first token in vocabulary order up to which more than u of the mass that is left lies. Masses are fp64.
The same as `specserve.compute.sampler`, whose penalties and bias are applied before; a row with NaN, or without any
token that is possible, is flagged bad (1 and 2) and gets token 0.

Rows that cut gather what the cuts can leave in a list, with two passes over the logits, and are cut and drawn from it
(sampling_list_triton.py). Of a row that may keep more than LIST_PLACES tokens, kth value and v are found by bisection
on the bits of fp32 over the whole vocabulary, 4 bits a pass. Both are exact and need no sort. A row is split over
programs of `BLOCK` tokens, so that few rows use the whole device too. Launches depend on shapes alone, so a CUDA graph
can hold them; which stages are launched is for the host to say, and a row skips what it does not ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

BLOCK = 4096  # tokens a program
LIST_PLACES = 8192  # tokens of a row's list
_NUM_WAYS = 16  # bounds a pass of the bisection tests
_STEPS = tuple(1 << shift for shift in range(28, -1, -4))  # between the bounds of each pass


class SamplingRow(NamedTuple):
    """Parameters of one row; the defaults are greedy."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.0  # in [0, 1)
    mask_row: int = -1  # row of the masks, -1: none


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """Parameters of R rows in one storage, so that one copy brings them to the device; masks stand apart."""

    storage: torch.Tensor  # [R * 36] uint8, what all but the masks are views of
    top_p: torch.Tensor  # [R] float64
    min_p: torch.Tensor  # [R] float64
    uniform: torch.Tensor  # [R] float64
    temperature: torch.Tensor  # [R] float32
    top_k: torch.Tensor  # [R] int32
    mask_row: torch.Tensor  # [R] int32
    masks: torch.Tensor  # [M, ceil(V / 32)] int32: token t is allowed where bit t % 32 of word t // 32 is set

    @classmethod
    def allocate(
        cls, num_rows: int, vocab_size: int, num_masks: int, device: torch.device | str, *, pin: bool = False
    ) -> SamplingTensors:
        """All rows greedy, all masks empty. `pin` is for the host's twin of a CUDA one; masks always have a row."""
        storage = torch.zeros(num_rows * 36, dtype=torch.uint8, device=device, pin_memory=pin)
        masks = torch.zeros(max(1, num_masks), -(-vocab_size // 32), dtype=torch.int32, device=device, pin_memory=pin)
        wide = storage[: num_rows * 24].view(torch.float64).view(3, num_rows)
        narrow = storage[num_rows * 24 :]
        temperature = narrow[: num_rows * 4].view(torch.float32)
        ints = narrow[num_rows * 4 :].view(torch.int32).view(2, num_rows)
        result = cls(storage, wide[0], wide[1], wide[2], temperature, ints[0], ints[1], masks)
        result.top_p.fill_(1.0)
        result.mask_row.fill_(-1)
        return result

    def write(self, rows: Sequence[SamplingRow]) -> None:
        """Set the first rows, and those behind them to greedy; for the host's twin."""
        assert len(rows) <= self.top_p.shape[0], (len(rows), self.top_p.shape[0])
        targets = (self.temperature, self.top_k, self.top_p, self.min_p, self.uniform, self.mask_row)
        for idx, (target, greedy) in enumerate(zip(targets, SamplingRow(), strict=True)):
            target.fill_(greedy)
            if rows:
                target[: len(rows)].copy_(torch.tensor([row[idx] for row in rows], dtype=target.dtype))

    def copy_(self, other: SamplingTensors) -> None:
        """Take over the parameters of as many rows, without the masks; asynchronous from pinned memory."""
        self.storage.copy_(other.storage, non_blocking=True)


@dataclass(frozen=True, slots=True)
class SamplingLists:
    """Rows' tokens that top-k or top-p can leave, for up to R rows: B blocks a row, LIST_PLACES tokens at most."""

    counts: torch.Tensor  # [R, B, 64] int32
    masses: torch.Tensor  # [R, B] float64
    x: torch.Tensor  # [R, LIST_PLACES] float32
    token: torch.Tensor  # [R, LIST_PLACES] int32
    size: torch.Tensor  # [R] int32
    row_mass: torch.Tensor  # [R] float64

    @classmethod
    def allocate(cls, num_rows: int, num_blocks: int, device: torch.device | str) -> SamplingLists:
        def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            counts=make(num_rows, num_blocks, 64, dtype=torch.int32),
            masses=make(num_rows, num_blocks, dtype=torch.float64),
            x=make(num_rows, LIST_PLACES, dtype=torch.float32),
            token=make(num_rows, LIST_PLACES, dtype=torch.int32),
            size=make(num_rows, dtype=torch.int32),
            row_mass=make(num_rows, dtype=torch.float64),
        )


@dataclass(frozen=True, slots=True)
class SamplingScratch:
    """What launches hand on, for up to R rows: B blocks a row."""

    block_best: torch.Tensor  # [R, B] float32
    block_token: torch.Tensor  # [R, B] int32
    block_nan: torch.Tensor  # [R, B] int32
    block_mass: torch.Tensor  # [R, B] float64
    partials: torch.Tensor  # [2, R, B, 16] float64
    bounds: torch.Tensor  # [2, R] int32
    thresholds: torch.Tensor  # [R] int32
    goals: torch.Tensor  # [R] float64
    row_top: torch.Tensor  # [R] float32
    is_done: torch.Tensor  # [R] int32: drawn from its list
    lists: SamplingLists

    @classmethod
    def allocate(cls, num_rows: int, vocab_size: int, device: torch.device | str) -> SamplingScratch:
        def make(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        blocks = -(-vocab_size // BLOCK)
        return cls(
            block_best=make(num_rows, blocks, dtype=torch.float32),
            block_token=make(num_rows, blocks, dtype=torch.int32),
            block_nan=make(num_rows, blocks, dtype=torch.int32),
            block_mass=make(num_rows, blocks, dtype=torch.float64),
            partials=make(2, num_rows, blocks, _NUM_WAYS, dtype=torch.float64),
            bounds=make(2, num_rows, dtype=torch.int32),
            thresholds=make(num_rows, dtype=torch.int32),
            goals=make(num_rows, dtype=torch.float64),
            row_top=make(num_rows, dtype=torch.float32),
            is_done=make(num_rows, dtype=torch.int32),
            lists=SamplingLists.allocate(num_rows, blocks, device),
        )


def sample_logits_reference(logits: torch.Tensor, params: SamplingTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, written to be read: tokens [L] int64 and bad [L] int32 of logits [L, V] float32, row by row."""
    num_rows, vocab_size = logits.shape
    tokens = torch.zeros(num_rows, dtype=torch.int64)
    bad = torch.zeros(num_rows, dtype=torch.int32)
    ids = torch.arange(vocab_size)
    for row in range(num_rows):
        x = logits[row].cpu().clone()
        has_nan = bool(x.isnan().any())
        mask_row = int(params.mask_row[row])
        if mask_row >= 0:
            x[params.masks[mask_row].cpu()[ids // 32] >> (ids % 32) & 1 == 0] = -torch.inf
        if has_nan or x.max() == -torch.inf:
            bad[row] = 1 if has_nan else 2
            continue
        temperature, top_k, top_p = params.temperature[row].cpu(), int(params.top_k[row]), float(params.top_p[row])
        if temperature == 0:
            tokens[row] = int((x == x.max()).nonzero()[0])
            continue
        x = x / temperature
        weights = torch.where(x == x.max(), 1.0, (x.double() - x.double().max()).exp())
        if 0 < top_k < vocab_size:
            weights[x < x.sort(descending=True).values[top_k - 1]] = 0.0
        if top_p < 1.0:
            order = torch.argsort(x, descending=True)
            mass = weights[order].cumsum(0)
            last = min(int((mass < top_p * mass[-1]).sum()), vocab_size - 1)  # the token that reaches it stays
            weights[x < x[order[last]]] = 0.0
        weights[weights < float(params.min_p[row])] = 0.0
        sums = weights.cumsum(0)
        past = (sums > float(params.uniform[row]) * sums[-1]) & (weights > 0)
        tokens[row] = int(past.nonzero()[0]) if past.any() else int(weights.nonzero()[-1])
    return tokens, bad


def sample_logits_(
    tokens: torch.Tensor,
    bad: torch.Tensor,
    logits: torch.Tensor,
    params: SamplingTensors,
    scratch: SamplingScratch,
    *,
    draws: bool = True,
    cuts_top_k: bool = True,
    cuts_top_p: bool = True,
) -> None:
    """Write a token [L] int64 and a flag [L] int32 for each row of logits [L, V] float32; parameters have rows enough.

    2 launches; 2 more when rows `draws` (some temperature is not 0), 3 when some row of those has a top-k or a top-p,
    and 9 for each of the two, which are empty but for rows without a list. A row that asks for a stage that is not
    launched goes without it, so the host must say what it has. CPU tensors work under Triton's interpreter, for tests.
    """
    num_rows, vocab_size = logits.shape
    num_blocks = -(-vocab_size // BLOCK)
    assert logits.dtype == torch.float32 and logits.stride(1) == 1, (logits.dtype, logits.stride())
    assert tokens.shape == bad.shape == (num_rows,) and tokens.dtype == torch.int64 and bad.dtype == torch.int32
    assert num_rows <= params.top_p.shape[0] and num_rows <= scratch.goals.shape[0], num_rows
    assert scratch.block_best.shape[1] == num_blocks and params.masks.shape[1] * 32 >= vocab_size
    import triton

    from . import sampling_triton as kernels

    s, p = scratch, params
    blocks = triton.next_power_of_2(num_blocks)
    grid = (num_rows, num_blocks)
    shape = (vocab_size, logits.stride(0), p.masks.stride(0))
    kernels.best_of_blocks[grid](
        s.block_best, s.block_token, s.block_nan, logits, p.masks, p.mask_row, *shape, BLOCK=BLOCK
    )
    kernels.best_of_rows[(num_rows,)](
        tokens, bad, s.row_top, s.thresholds, s.is_done, s.block_best, s.block_token, s.block_nan, p.temperature,
        num_blocks, BLOCKS=blocks,
    )  # fmt: skip
    if not draws:
        return
    if cuts_top_k or cuts_top_p:
        _draw_from_lists(tokens, bad, logits, params, scratch)
    part = 128 if logits.is_cuda else BLOCK  # the interpreter is slow by the operation, not by the element
    for counts in [True] * cuts_top_k + [False] * cuts_top_p:
        for idx, step in enumerate(_STEPS):
            new, old = idx % 2, 1 - idx % 2
            kernels.narrow[grid](
                s.partials[new], s.partials[old], s.bounds[new], s.bounds[old], s.goals, s.thresholds, s.row_top,
                logits, p.masks, p.temperature, p.top_k, p.top_p, p.mask_row, s.is_done, *shape, idx, step,
                COUNTS=counts, BLOCK=BLOCK, PART=part, BLOCKS=blocks,
            )  # fmt: skip
        last = (len(_STEPS) - 1) % 2
        kernels.settle[(num_rows,)](
            s.thresholds, s.goals, s.partials[last], s.bounds[last], s.row_top, p.temperature, p.top_k, p.top_p,
            s.is_done, vocab_size, num_blocks, COUNTS=counts, BLOCKS=blocks,
        )  # fmt: skip
    kernels.weigh_blocks[grid](
        s.block_mass, s.thresholds, s.row_top, logits, p.masks, p.temperature, p.min_p, p.mask_row, s.is_done, *shape,
        BLOCK=BLOCK,
    )  # fmt: skip
    kernels.draw[(num_rows,)](
        tokens, bad, s.block_mass, s.thresholds, s.row_top, logits, p.masks, p.temperature, p.min_p, p.uniform,
        p.mask_row, s.is_done, vocab_size, num_blocks, *shape[1:], BLOCK=BLOCK, BLOCKS=blocks,
    )  # fmt: skip


def _draw_from_lists(
    tokens: torch.Tensor,
    bad: torch.Tensor,
    logits: torch.Tensor,
    params: SamplingTensors,
    scratch: SamplingScratch,
) -> None:
    """Three launches, which draw for rows with top-k or top-p whose list has room and mark these as done."""
    import triton

    from . import sampling_list_triton as kernels

    num_rows, vocab_size = logits.shape
    num_blocks = -(-vocab_size // BLOCK)
    grid, shape = (num_rows, num_blocks), (vocab_size, logits.stride(0), params.masks.stride(0))
    s, p, rows = scratch, params, scratch.lists
    cuts = (p.temperature, p.top_k, p.top_p)
    part = 1024 if logits.is_cuda else BLOCK
    kernels.tally[grid](
        rows.counts, rows.masses, logits, p.masks, s.row_top, bad, *cuts, p.mask_row, *shape, BLOCK=BLOCK, PART=part
    )
    kernels.gather[grid](
        rows.x, rows.token, rows.size, rows.row_mass, rows.counts, rows.masses, logits, p.masks, s.row_top, bad, *cuts,
        p.mask_row, *shape, num_blocks, LIST_PLACES, BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=8,
    )  # fmt: skip
    kernels.choose[(num_rows,)](
        tokens, s.is_done, rows.x, rows.token, rows.size, rows.row_mass, s.row_top, bad, *cuts, p.min_p, p.uniform,
        vocab_size, PLACES=LIST_PLACES, num_warps=8,
    )  # fmt: skip
