"""The bound that some models, Gemma among them, put on their logits and on scores of attention; for every path."""

from __future__ import annotations

import torch


def softcap_(values: torch.Tensor, cap: float | None) -> None:
    """values = cap * tanh(values / cap), in place; None or 0 is no cap."""
    if cap:
        values.div_(cap).tanh_().mul_(cap)
