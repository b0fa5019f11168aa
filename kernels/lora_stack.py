"""The LoRA weights of one fused linear for the adapters of a batch, and the dispatch that applies them.

Owns how weights are laid out for each device, decided when a stack is built: it is built once per set of adapters and
serves many steps. Does not own which rows use which adapter (segments.py) or the arithmetic (sgmv.py, bgmv.py).
Invariant: true ranks. Work and memory traffic of an adapter follow its own rank in each module, 0 where untargeted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .bgmv import bgmv_triton_
from .segments import Segments
from .sgmv import sgmv_torch_, sgmv_triton_


class LoraPair(NamedTuple):
    """One module of one adapter, in PEFT orientation: y += scale * (x @ A^T) @ B^T."""

    a: torch.Tensor  # [R, in]
    b: torch.Tensor  # [out, R]
    scale: float


@dataclass(frozen=True, slots=True)
class RankGroup:
    """Adapters with the same ranks over the modules, stacked in fp32. n members, R summed ranks."""

    members: tuple[int, ...]  # slots, ascending
    a: torch.Tensor  # [n, in, R], modules side by side
    b: tuple[tuple[slice, slice, torch.Tensor], ...]  # targeted modules: columns of h, of y, scaled B [n, R_m, out_m]
    launch_rows: int  # what one more launch costs, in rows of work with one member


@dataclass(frozen=True, slots=True)
class PointerTables:
    """Where the Triton kernels find each slot's weights: separate tensors, nothing copied or padded. M modules."""

    weights: torch.Tensor  # [slots, M, 2] int64, addresses of A and B; 0 where untargeted
    ranks: torch.Tensor  # [slots, M] int32, 0 where untargeted
    scales: torch.Tensor  # [slots, M] fp32
    columns: torch.Tensor  # [M, 3] int32: first column in h, first column in y, number of columns in y
    is_aligned: bool  # every address is a multiple of 16 bytes, so loads may be vectors
    h_size: int  # columns of the intermediate: the largest rank of each module, side by side (space, not work)
    max_rank: int


class LoraStack:
    """Weights of one fused linear (such as q, k, v side by side) in one layer, for the slots of a batch.

    `slots[s][m]` is adapter s in module m, None where it does not target it; `out_sizes` are the modules' widths in y.
    All pairs share one dtype and one device. On the CPU the stack holds fp32 copies, with each scale folded into B;
    on CUDA it holds the given tensors and tables of their addresses.
    """

    def __init__(self, slots: Sequence[Sequence[LoraPair | None]], out_sizes: tuple[int, ...]):
        self.slots = tuple(tuple(_contiguous(pair) for pair in modules) for modules in slots)
        self.out_sizes = out_sizes
        pairs = [pair for modules in self.slots for pair in modules if pair is not None]
        self.is_empty = not pairs
        self.groups: tuple[RankGroup, ...] = ()
        self.tables: PointerTables | None = None
        if self.is_empty:
            return
        in_size, device = pairs[0].a.shape[1], pairs[0].a.device
        for modules in self.slots:
            for pair, out_size in zip(modules, out_sizes, strict=True):
                assert pair is None or pair.a.device == pair.b.device == device
                assert pair is None or (pair.a.shape[1] == in_size and pair.b.shape == (out_size, pair.a.shape[0]))
        if device.type == "cuda":
            self.tables = _pointer_tables(self.slots, out_sizes)
        else:
            self.groups = _rank_groups(self.slots, out_sizes)

    @property
    def dtype(self) -> torch.dtype:
        return next(pair.a.dtype for modules in self.slots for pair in modules if pair is not None)

    def pointer_tables(self) -> PointerTables:
        """The tables for the Triton kernels; built on demand on the CPU, where only the interpreter asks for them."""
        if self.tables is None:
            self.tables = _pointer_tables(self.slots, self.out_sizes)
        return self.tables


def add_lora_(y: torch.Tensor, x: torch.Tensor, stack: LoraStack, segments: Segments) -> None:
    """Add to each row of y its own adapter's LoRA of the same row of x, in place.

    y is [T, sum(out_sizes)] and x is [T, in], each row contiguous. Sums are fp32 whatever the dtypes. Rows without an
    adapter and columns of modules that an adapter does not target are not touched.
    """
    assert x.shape[0] == y.shape[0] == segments.num_rows, (x.shape, y.shape, segments.num_rows)
    if stack.is_empty or not segments.has_adapters:
        return
    if not y.is_cuda:
        sgmv_torch_(y, x, stack, segments)
    elif segments.is_single_row:
        bgmv_triton_(y, x, stack, segments)
    else:
        sgmv_triton_(y, x, stack, segments)


def _pointer_tables(slots: Sequence[Sequence[LoraPair | None]], out_sizes: tuple[int, ...]) -> PointerTables:
    """The tables of `slots`, on the device of its weights, which must stay alive as long as the tables."""
    device = next(pair.a.device for modules in slots for pair in modules if pair is not None)
    empty = (0, 0, 0, 0.0)
    rows = [
        [empty if p is None else (p.a.data_ptr(), p.b.data_ptr(), p.a.shape[0], p.scale) for p in modules]
        for modules in slots
    ]
    columns, h_start, y_start = [], 0, 0
    for module, out_size in enumerate(out_sizes):
        columns.append((h_start, y_start, out_size))
        h_start += max(modules[module][2] for modules in rows)
        y_start += out_size
    return PointerTables(
        weights=torch.tensor([[(a, b) for a, b, _, _ in modules] for modules in rows], device=device),
        ranks=torch.tensor([[r for _, _, r, _ in modules] for modules in rows], dtype=torch.int32, device=device),
        scales=torch.tensor([[s for _, _, _, s in modules] for modules in rows], dtype=torch.float32, device=device),
        columns=torch.tensor(columns, dtype=torch.int32, device=device),
        is_aligned=all(a % 16 == 0 and b % 16 == 0 for modules in rows for a, b, _, _ in modules),
        h_size=h_start,
        max_rank=max(r for modules in rows for _, _, r, _ in modules),
    )


# One launch more costs about 25 us of calls: 8 rows of work with the 41 k weights that a rank-16 adapter has in one
# fused linear of SmolLM2-135M on average, fewer rows with larger weights.
_LAUNCH_WEIGHTS = 8 * 41_000


def _rank_groups(slots: tuple[tuple[LoraPair | None, ...], ...], out_sizes: tuple[int, ...]) -> tuple[RankGroup, ...]:
    members_of: dict[tuple[int, ...], list[int]] = {}
    for slot, modules in enumerate(slots):
        ranks = tuple(0 if pair is None else pair.a.shape[0] for pair in modules)
        if any(ranks):
            members_of.setdefault(ranks, []).append(slot)
    groups = []
    for ranks, members in members_of.items():
        a = torch.stack([torch.cat([pair.a for pair in slots[s] if pair is not None]).float().t() for s in members])
        b, h_start, y_start = [], 0, 0
        for module, (rank, out_size) in enumerate(zip(ranks, out_sizes, strict=True)):
            if rank:
                pairs = [slots[s][module] for s in members]
                scaled = torch.stack([pair.b.float().t() * pair.scale for pair in pairs if pair is not None])
                b.append((slice(h_start, h_start + rank), slice(y_start, y_start + out_size), scaled))
            h_start += rank
            y_start += out_size
        num_weights = (a.numel() + sum(scaled.numel() for _, _, scaled in b)) // len(members)
        # A power of two, so that a model's stacks share few plans.
        launch_rows = 1 << max(0, round(math.log2(_LAUNCH_WEIGHTS / num_weights)))
        groups.append(RankGroup(tuple(members), a.contiguous(), tuple(b), launch_rows))
    return tuple(groups)


def _contiguous(pair: LoraPair | None) -> LoraPair | None:
    return None if pair is None else LoraPair(pair.a.contiguous(), pair.b.contiguous(), pair.scale)
