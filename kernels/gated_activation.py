"""The gated activation of an MLP: out = act(gate) * up for the fused columns gate_up = [gate | up].

Semantics: out[r, i] = act(gate_up[r, i]) * gate_up[r, I + i] in fp32, rounded once, with act one of
    silu: x * sigmoid(x)        gelu_tanh: x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
"""

from __future__ import annotations

import math

import torch

from .dependent_launch import dependent_launch
from .written_rounding import WRITTEN_ROUNDING

KINDS = ("silu", "gelu_tanh")
BLOCK = 1024  # columns a program: 8 a thread of 4 warps, two 16-byte loads and one store at 16 bits


def gated_activation(gate_up: torch.Tensor, kind: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """out [T, I] in gate_up's dtype (or out's) for gate_up [T, 2 I], rows contiguous; `kind` is one of KINDS."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
    if out is None:
        out = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    assert out.shape == (num_rows, size) and gate_up.shape[1] == 2 * size, (out.shape, gate_up.shape)
    assert gate_up.stride(1) == out.stride(1) == 1, (gate_up.stride(), out.stride())
    if num_rows == 0:
        return out
    import triton

    from .gated_activation_triton import gated_activation_kernel

    gated_activation_kernel[(num_rows, triton.cdiv(size, BLOCK))](
        out, gate_up, size, out.stride(0), gate_up.stride(0), GELU=kind == "gelu_tanh", BLOCK=BLOCK, num_warps=4,
        **WRITTEN_ROUNDING, **dependent_launch(out.device),
    )  # fmt: skip
    return out


def gated_activation_reference(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """The definition in float32, [T, I]."""
    x, up = gate_up.float().chunk(2, dim=-1)
    if kind == "silu":
        return x / (1 + torch.exp(-x)) * up
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) * up
