"""Residual addition and RMS norm (Zhang & Sennrich 2019) in one pass over the rows.

Semantics, for row r of residual [T, H] and the output h [T, H] of the layer before it:
    residual[r] += h[r], or rms_norm(h[r]) * post_weight with post norms (Gemma 3, OLMo)     (no addition if h is None)
    out[r] = rms_norm(residual[r]) * weight, or residual[r] if weight is None;  rms_norm(x) = x / sqrt(mean(x^2) + eps)
Arithmetic is fp32 with one rounding of residual and one of out. The norm reads the residual as rounded, so it is the
same function of the stored row wherever that row is normed: by this kernel or by linear_fused.py, to the bit.
"""

from __future__ import annotations

import torch

from .dependent_launch import dependent_launch
from .written_rounding import WRITTEN_ROUNDING

MAX_BLOCK = 16384  # columns of one pass; longer rows loop


def add_rms_norm_(
    residual: torch.Tensor,
    h: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    *,
    post_weight: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add h to residual in place and return the norm, [T, H] in out's dtype, else h's, else residual's.

    residual, h, out [T, H] in any float dtype, rows contiguous; weight and post_weight [H] float32. h may be out, or
    residual if h is None.
    """
    if out is None:
        out = torch.empty_like(residual if h is None else h)
    num_rows, hidden = out.shape
    assert residual.shape == out.shape, (residual.shape, out.shape)
    assert h is None or h.shape == residual.shape, (h.shape if h is not None else None, residual.shape)
    assert post_weight is None or h is not None
    tensors = [t for t in (out, residual, h, weight, post_weight) if t is not None]
    assert all(t.stride(-1) == 1 for t in tensors), [t.stride() for t in tensors]
    if num_rows == 0:
        return out
    import triton

    from .add_norm_triton import add_rms_norm_kernel

    some_weight = residual if weight is None else weight
    block = min(MAX_BLOCK, triton.next_power_of_2(hidden))
    # 8 columns a thread are 16-byte loads at 16 bits; a row of 16384 has 32 a thread with the most warps worth having.
    num_warps = min(16, max(1, block // 256))
    add_rms_norm_kernel[(num_rows,)](
        out,
        residual,
        residual if h is None else h,
        some_weight,
        some_weight if post_weight is None else post_weight,
        hidden,
        eps,
        out.stride(0),
        residual.stride(0),
        0 if h is None else h.stride(0),
        HAS_H=h is not None,
        HAS_WEIGHT=weight is not None,
        HAS_POST=post_weight is not None,
        BLOCK=block,
        NUM_BLOCKS=triton.cdiv(hidden, block),
        num_warps=num_warps,
        **WRITTEN_ROUNDING,
        **dependent_launch(out.device),
    )
    return out


def add_rms_norm_reference(
    residual: torch.Tensor,
    h: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    post_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition in float32: the new residual and its norm, [T, H] each."""
    new, normed = torch.empty(residual.shape), torch.empty(residual.shape)
    for row in range(residual.shape[0]):
        x = residual[row].float()
        if h is not None:
            added = h[row].float()
            if post_weight is not None:
                added = added / (added.square().mean() + eps).sqrt() * post_weight
            x = x + added
        new[row] = x
        normed[row] = x if weight is None else x / (x.square().mean() + eps).sqrt() * weight
    return new, normed
