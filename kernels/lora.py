"""LoRA (Hu et al. 2021): one module of one adapter, its product in torch on any device, and the definition by rows.

Semantics: y += scale * (x A^T) B^T. Sums are fp32 whatever the dtypes, with one rounding to y's. What serves a ragged
batch of many adapters is the native path's (cpu/lora.h) and, on a GPU, lora_blocks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch


class LoraPair(NamedTuple):
    """One module of one adapter, in PEFT orientation."""

    a: torch.Tensor  # [R, in]
    b: torch.Tensor  # [out, R]
    scale: float


class Empty(Protocol):
    """Gives memory, as `torch.empty` does."""

    def __call__(self, size: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor: ...


def lora_add_pair_(y: torch.Tensor, x: torch.Tensor, pair: LoraPair) -> None:
    """Add one module of one adapter to the rows y [n, out] for x [n, in], in place; y may be columns of a wider y."""
    h = x.float() @ pair.a.float().t()  # [n, R]
    y += pair.scale * (h @ pair.b.float().t())


def lora_reference(
    y: torch.Tensor,
    x: torch.Tensor,
    slots: Sequence[Sequence[LoraPair | None]],
    out_sizes: tuple[int, ...],
    row_slots: Sequence[int],
) -> torch.Tensor:
    """The definition, written to be read: y [T, sum(out_sizes)] in fp32 with the LoRA added; `slots[slot][module]`."""
    y = y.float().clone()
    for row, slot in enumerate(row_slots):
        if slot == -1:
            continue
        column = 0
        for pair, out_size in zip(slots[slot], out_sizes, strict=True):
            if pair is not None:
                h = pair.a.float() @ x[row].float()  # [R]
                y[row, column : column + out_size] += pair.scale * (pair.b.float() @ h)
            column += out_size
    return y
