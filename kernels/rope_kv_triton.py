"""The Triton kernel of head norms, rotation and KV write: a program has one row and a block of its heads.

Semantics and launch: rope_kv.py. The two halves of a head are two tiles [heads, D / 2], so that the rotation needs no
exchange between threads. Value heads go through the same tiles and only skip the arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def rotated(x, other, cos, sin):
    """x * cos + other * sin in fp32, other being x's of the other half; its rounding is not the compiler's choice."""
    return tl.fma(other, sin, x * cos)


@triton.jit
def _normed(first, second, q_norm, k_norm, eps, is_query, d, HEAD_DIM: tl.constexpr):
    """Both halves of heads [heads, D / 2] in fp32, normed over D; `is_query` [heads] says by which factors."""
    HALF: tl.constexpr = HEAD_DIM // 2
    is_d = d < HALF
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    scale = tl.rsqrt(squares / HEAD_DIM + eps)
    q_first = tl.load(q_norm + d, mask=is_d, other=0.0).to(tl.float32)
    q_second = tl.load(q_norm + HALF + d, mask=is_d, other=0.0).to(tl.float32)
    k_first = tl.load(k_norm + d, mask=is_d, other=0.0).to(tl.float32)
    k_second = tl.load(k_norm + HALF + d, mask=is_d, other=0.0).to(tl.float32)
    first = first * scale[:, None] * tl.where(is_query[:, None], q_first[None, :], k_first[None, :])
    second = second * scale[:, None] * tl.where(is_query[:, None], q_second[None, :], k_second[None, :])
    return first, second


@triton.jit
def rope_store_kernel(
    qkv, cos, sin, slot_mapping, k_cache, v_cache, q_norm, k_norm, eps, qkv_stride, k_stride, v_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HAS_NORM: tl.constexpr,
    NORMS_TURNED: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (rows, blocks of heads)."""
    if IS_DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    HALF: tl.constexpr = HEAD_DIM // 2
    NUM_ROTATED: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, BLOCK_HALF)
    is_d = d < HALF
    is_rotated = heads < NUM_ROTATED
    mask = (heads < NUM_ROTATED + NUM_KV_HEADS)[:, None] & is_d[None, :]
    target = qkv + row * qkv_stride + heads[:, None] * HEAD_DIM + d[None, :]
    stored_first = tl.load(target, mask=mask, other=0.0)
    stored_second = tl.load(target + HALF, mask=mask, other=0.0)
    first, second = stored_first.to(tl.float32), stored_second.to(tl.float32)

    if HAS_NORM and not NORMS_TURNED:
        first, second = _normed(first, second, q_norm, k_norm, eps, heads < NUM_HEADS, d, HEAD_DIM)

    angle = row * HEAD_DIM + d
    cos_first = tl.load(cos + angle, mask=is_d, other=0.0)[None, :]
    cos_second = tl.load(cos + angle + HALF, mask=is_d, other=0.0)[None, :]
    sin_first = tl.load(sin + angle, mask=is_d, other=0.0)[None, :]
    sin_second = tl.load(sin + angle + HALF, mask=is_d, other=0.0)[None, :]
    dtype = qkv.dtype.element_ty
    rotated_first = rotated(first, second, cos_first, sin_first)
    rotated_second = rotated(second, first, cos_second, sin_second)
    if HAS_NORM and NORMS_TURNED:
        is_query = heads < NUM_HEADS
        rotated_first, rotated_second = _normed(
            rotated_first, rotated_second, q_norm, k_norm, eps, is_query, d, HEAD_DIM
        )
    rotated_first, rotated_second = rotated_first.to(dtype), rotated_second.to(dtype)
    rotated_mask = mask & is_rotated[:, None]
    tl.store(target, rotated_first, mask=rotated_mask)
    tl.store(target + HALF, rotated_second, mask=rotated_mask)

    slot = tl.load(slot_mapping + row)
    if slot >= 0:
        k_mask = rotated_mask & (heads >= NUM_HEADS)[:, None]
        k_target = k_cache + slot * k_stride + (heads - NUM_HEADS)[:, None] * HEAD_DIM + d[None, :]
        tl.store(k_target, rotated_first, mask=k_mask)
        tl.store(k_target + HALF, rotated_second, mask=k_mask)
        v_mask = mask & (heads >= NUM_ROTATED)[:, None]
        v_target = v_cache + slot * v_stride + (heads - NUM_ROTATED)[:, None] * HEAD_DIM + d[None, :]
        tl.store(v_target, stored_first, mask=v_mask)
        tl.store(v_target + HALF, stored_second, mask=v_mask)
