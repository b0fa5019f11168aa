"""The LoRA weights of one fused linear for the adapters of a batch, as the torch path on the CPU wants them.

Owns how weights are laid out there, built once per set of adapters and used for many steps; the device's are in
lora_tables.py. Does not own which rows use which adapter (segments.py) or the arithmetic (sgmv.py).
Invariant: true ranks. Work and memory traffic of an adapter follow its own rank in each module, 0 where untargeted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .segments import Segments
from .sgmv import sgmv_torch_


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


class LoraStack:
    """Weights of one fused linear (such as q, k, v side by side) in one layer, for the slots of a batch.

    `slots[s][m]` is adapter s in module m, None where it does not target it; `out_sizes` are the modules' widths in y.
    All pairs share one dtype. The stack holds fp32 copies, with each scale folded into B.
    """

    def __init__(self, slots: Sequence[Sequence[LoraPair | None]], out_sizes: tuple[int, ...]):
        self.slots = tuple(tuple(_contiguous(pair) for pair in modules) for modules in slots)
        self.out_sizes = out_sizes
        pairs = [pair for modules in self.slots for pair in modules if pair is not None]
        self.is_empty = not pairs
        self.groups: tuple[RankGroup, ...] = ()
        if self.is_empty:
            return
        in_size = pairs[0].a.shape[1]
        for modules in self.slots:
            for pair, out_size in zip(modules, out_sizes, strict=True):
                assert pair is None or (pair.a.shape[1] == in_size and pair.b.shape == (out_size, pair.a.shape[0]))
        self.groups = _rank_groups(self.slots, out_sizes)


def add_lora_(y: torch.Tensor, x: torch.Tensor, stack: LoraStack, segments: Segments) -> None:
    """Add to each row of y its own adapter's LoRA of the same row of x, in place.

    y is [T, sum(out_sizes)] and x is [T, in], each row contiguous. Sums are fp32 whatever the dtypes. Rows without an
    adapter and columns of modules that an adapter does not target are not touched.
    """
    assert x.shape[0] == y.shape[0] == segments.num_rows, (x.shape, y.shape, segments.num_rows)
    if stack.is_empty or not segments.has_adapters:
        return
    sgmv_torch_(y, x, stack, segments)


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
