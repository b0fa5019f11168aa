"""BGMV: batched gather matrix-vector products, the LoRA of steps in which every adapter segment has one row.

Semantics, for row t with adapter slot a(t) and every module m of a fused linear:
    y[t, columns(m)] += scale_{a(t),m} * (x[t] @ A_{a(t),m}^T) @ B_{a(t),m}^T
Invariant: the same bits as SGMV for the same row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .lora_stack import LoraStack
    from .segments import Segments


def bgmv_triton_(y: torch.Tensor, x: torch.Tensor, stack: LoraStack, segments: Segments) -> None:
    raise NotImplementedError
