"""Checks of the forward pass's row-wise kernels against their definitions, on any device and path.

test_forward_kernels.py runs them on the torch path and on CUDA, triton_forward_cases.py under Triton's interpreter.
"""

from __future__ import annotations

import torch

from specserve.kernels.add_norm import add_rms_norm_, add_rms_norm_reference, rms_norm_rows
from specserve.kernels.gated_activation import gated_activation, gated_activation_reference
from specserve.kernels.rope_kv import rope_reference, rope_store_

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EPS = 1e-5
NORM_SIZES = (8, 72, 576, 1000)
HEADS = ((9, 3, 64, False), (4, 4, 24, True), (8, 1, 128, True), (3, 1, 256, True), (8, 2, 8, False))


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual.cpu().float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def check_add_norm(dtype: torch.dtype, hidden: int, device: str, residual_dtype: torch.dtype | None = None) -> None:
    """With and without an addition and a post norm; a strided h; rows chosen in any order, padding among them."""
    torch.manual_seed(hidden)
    residual_dtype = residual_dtype or dtype
    residual = torch.randn(5, hidden).to(device, residual_dtype)
    wide = torch.randn(5, hidden + 8).to(device, dtype)
    h = wide[:, :hidden]
    weight, post = (torch.rand(hidden, device=device) + 0.5 for _ in "wp")
    rows = torch.tensor([4, -1, 0, 4], device=device)
    for added, post_weight in ((None, None), (h, None), (h, post)):
        host = [None if t is None else t.cpu() for t in (added, weight, post_weight)]
        new, normed = add_rms_norm_reference(residual.cpu(), host[0], host[1], EPS, host[2])
        got = residual.clone()
        out = add_rms_norm_(got, added, weight, EPS, post_weight=post_weight)
        assert out.dtype == (residual_dtype if added is None else dtype)
        close(got, new, residual_dtype)
        close(out, normed, dtype)

        before = residual.clone()
        sums = torch.full((4, hidden), torch.nan, device=device, dtype=residual_dtype)
        chosen = rms_norm_rows(residual, rows, weight, EPS, dtype, h=added, post_weight=post_weight, sums=sums)
        assert chosen.dtype == dtype and torch.equal(residual, before)
        padding = torch.tensor([False, True, False, False])
        assert torch.equal(chosen[0], chosen[3]) and not chosen[padding].any() and not sums[padding].any()
        close(chosen[~padding], normed[rows.cpu()[~padding]], dtype)
        close(sums[~padding], new[rows.cpu()[~padding]], residual_dtype)
    target = torch.empty(5, hidden, device=device, dtype=dtype)
    assert add_rms_norm_(residual.clone(), h, weight, EPS, out=target) is target


def check_rope(dtype: torch.dtype, heads: tuple[int, int, int, bool], device: str) -> None:
    """Rows between padded rows, slots in no order, qkv a strided view; other slots and columns stay."""
    num_heads, num_kv_heads, head_dim, has_norm = heads
    torch.manual_seed(head_dim)
    num_rows, size = 6, (num_heads + 2 * num_kv_heads) * head_dim
    wide = torch.randn(num_rows, size + 16).to(device, dtype)
    before, qkv = wide.clone(), wide[:, :size]
    slots = torch.tensor([7, -1, 2, 11, 0, -1], device=device)
    angles = torch.rand(num_rows, head_dim // 2) * 6
    cos = torch.cat([angles.cos()] * 2, -1).to(device)
    sin = torch.cat([-angles.sin(), angles.sin()], -1).to(device)
    q_norm, k_norm = (torch.rand(head_dim, device=device) + 0.5 if has_norm else None for _ in "qk")
    caches = [torch.full((12, num_kv_heads, head_dim), torch.nan, device=device, dtype=dtype) for _ in "kv"]
    rope_store_(qkv, cos, sin, slots, *caches, num_heads, num_kv_heads, q_norm, k_norm, EPS)

    given = before[:, :size].cpu().view(num_rows, -1, head_dim)
    got = qkv.cpu().reshape(num_rows, -1, head_dim)
    parts = (slice(0, num_heads), slice(num_heads, num_heads + num_kv_heads), slice(num_heads + num_kv_heads, None))
    for part, weight in zip(parts, (q_norm, k_norm), strict=False):
        norm = None if weight is None else weight.cpu()
        close(got[:, part], rope_reference(given[:, part], cos.cpu(), sin.cpu(), norm, EPS), dtype)
    assert torch.equal(got[:, parts[2]], given[:, parts[2]]) and torch.equal(wide[:, size:], before[:, size:])
    used = slots.cpu() >= 0
    written = slots.cpu()[used]
    for cache, part in zip(caches, parts[1:], strict=True):
        assert torch.equal(cache.cpu()[written], got[used][:, part])
        rest = torch.ones(12, dtype=torch.bool)
        rest[written] = False
        assert cache.cpu()[rest].isnan().all(), "a slot that no row names was written"


def check_activation(dtype: torch.dtype, kind: str, size: int, device: str) -> None:
    torch.manual_seed(size)
    wide = (torch.randn(3, 2 * size + 8) * 3).to(device, dtype)
    gate_up = wide[:, : 2 * size]
    gate_up[0, 0], gate_up[1, 0] = -1000, 1000  # exp overflows there
    expected = gated_activation_reference(gate_up.cpu(), kind)
    out = gated_activation(gate_up, kind)
    assert out.dtype == dtype and out.shape == (3, size)
    close(out, expected, dtype)
    target = torch.empty_like(out)
    assert gated_activation(gate_up, kind, target) is target and torch.equal(target, out)
