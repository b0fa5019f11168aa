"""BGMV: batched gather matrix-vector products, the LoRA of steps in which every adapter segment has one row (decode).

Semantics, for row t with adapter slot a(t) and every module m of a fused linear:
    y[t, columns(m)] += scale_{a(t),m} * (x[t] @ A_{a(t),m}^T) @ B_{a(t),m}^T
SGMV's list of tiles changes its length with the segments; BGMV reads one slot a row, so that its grid depends on the
number of rows alone, which a captured CUDA graph needs. Invariant: the same bits as SGMV for the same row.
On the CPU both are `sgmv_torch_`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .segments import Segments, row_tables
from .sgmv import launch_triton_

if TYPE_CHECKING:
    from .lora_stack import LoraStack


def bgmv_reference(y: torch.Tensor, x: torch.Tensor, stack: LoraStack, row_slots: list[int]) -> torch.Tensor:
    """The definition, written to be read: returns y [T, sum(out_sizes)] in fp32 with the LoRA added, row by row."""
    y = y.float().clone()
    for row, slot in enumerate(row_slots):
        if slot == -1:
            continue
        column = 0
        for pair, out_size in zip(stack.slots[slot], stack.out_sizes, strict=True):
            if pair is not None:
                h = pair.a.float() @ x[row].float()  # [R]
                y[row, column : column + out_size] += pair.scale * (pair.b.float() @ h)
            column += out_size
    return y


def bgmv_triton_(y: torch.Tensor, x: torch.Tensor, stack: LoraStack, segments: Segments) -> None:
    """BGMV on CUDA: one shrink and one expand launch, a program a row. Right for any segments, meant for single rows.

    Rows of x and y are contiguous, weights have x's dtype. CPU tensors work under Triton's interpreter, for tests.
    """
    assert x.shape[0] == y.shape[0] == segments.num_rows, (x.shape, y.shape, segments.num_rows)  # else writes astray
    row_slots = segments.row_slots
    if row_slots is None:
        row_slots, _ = row_tables(segments.starts, segments.slots, x.device)
    from .lora_triton import bgmv_expand, bgmv_shrink

    launch_triton_(y, x, stack, bgmv_shrink, bgmv_expand, row_slots)
