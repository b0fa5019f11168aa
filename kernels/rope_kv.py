"""What stands between the q/k/v projection and attention, in one launch: head norms, rotation, and the KV write.

Semantics, for row r of qkv [T, (Hq + 2 Hkv) * D] (query heads, then key heads, then value heads):
    q and k heads: RMS-normed over D and scaled by q_norm or k_norm if given, then x * cos[r] + swap_halves(x) * sin[r];
    or the other way round (norms_turned)
    k_cache[slot_mapping[r]] = the rotated k heads,   v_cache[slot_mapping[r]] = the v heads
q and k are also left in qkv, in place. sin carries the rotation's sign (minus in its first half). fp32 inside, rounded
once. A row whose slot_mapping is -1 is padding: its q and k change in place and nothing of it reaches a cache.
"""

from __future__ import annotations

import torch

from .dependent_launch import dependent_launch
from .written_rounding import WRITTEN_ROUNDING

ELEMENTS = 2048  # a program's: 16 a thread of 4 warps, so both halves of its heads are 16-byte loads at 16 bits


def rope_store_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    norms_turned: bool = False,
) -> None:
    """Norm and rotate q and k in place, and write k and v to the caches.

    qkv [T, (Hq + 2 Hkv) * D] with contiguous rows; cos, sin [T, D] float32; slot_mapping [T] int64, -1 for padding;
    caches [KV positions, Hkv, D] in qkv's dtype; q_norm, k_norm [D], both or none. D is even.
    """
    head_dim = k_cache.shape[2]
    assert qkv.shape[1] == (num_heads + 2 * num_kv_heads) * head_dim, (qkv.shape, num_heads, num_kv_heads, head_dim)
    assert (q_norm is None) == (k_norm is None) and head_dim % 2 == 0
    cos, sin = cos.view(-1, head_dim), sin.view(-1, head_dim)
    num_rows = qkv.shape[0]
    assert qkv.stride(1) == 1 and cos.is_contiguous() and sin.is_contiguous()
    for cache in (k_cache, v_cache):
        assert cache.stride()[1:] == (head_dim, 1), cache.stride()
    if num_rows == 0:
        return
    import triton

    from .rope_kv_triton import rope_store_kernel

    block_half = triton.next_power_of_2(head_dim // 2)
    block_heads = max(1, ELEMENTS // (2 * block_half))
    has_norm = q_norm is not None
    rope_store_kernel[(num_rows, triton.cdiv(num_heads + 2 * num_kv_heads, block_heads))](
        qkv,
        cos,
        sin,
        slot_mapping,
        k_cache,
        v_cache,
        q_norm if has_norm else cos,
        k_norm if has_norm else cos,
        eps,
        qkv.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        HAS_NORM=has_norm,
        NORMS_TURNED=norms_turned,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        num_warps=4,
        **WRITTEN_ROUNDING,
        **dependent_launch(qkv.device),
    )


def rope_reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    norms_turned: bool = False,
) -> torch.Tensor:
    """Heads x [T, heads, D] normed and rotated by the definition, in float32."""
    if norms_turned:
        still, none = torch.ones_like(cos), torch.zeros_like(sin)
        return rope_reference(rope_reference(x, cos, sin, None, eps), still, none, weight, eps)
    out = torch.empty(x.shape)
    half = x.shape[2] // 2
    for row in range(x.shape[0]):
        for head in range(x.shape[1]):
            value = x[row, head].float()
            if weight is not None:
                value = value / (value.square().mean() + eps).sqrt() * weight.float()
            first, second = value[:half], value[half:]
            out[row, head, :half] = first * cos[row, :half] + second * sin[row, :half]
            out[row, head, half:] = second * cos[row, half:] + first * sin[row, half:]
    return out
