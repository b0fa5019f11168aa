"""The bound that some models, Gemma among them, put on their logits; the same for every path."""

from __future__ import annotations

import torch


def softcap_(logits: torch.Tensor, cap: float | None) -> None:
    """logits = cap * tanh(logits / cap), in place; None or 0 is no cap."""
    if cap:
        logits.div_(cap).tanh_().mul_(cap)
