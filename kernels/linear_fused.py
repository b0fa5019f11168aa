"""A layer's linears of few rows in one launch each with what stands before and behind them.

Semantics, with y = linear_rows(x, W, bias) or scaled_linear(x, W, bias), to the bit, and x given or, as `Normed`,
add_rms_norm_(rows, None, norm) of fp32 rows:
    linear_add_:   residual += y                        as add_rms_norm_ adds it
    linear_gated:  out = act(y[:, :I]) * y[:, I:]       as gated_activation
    linear_rope_:  q, and k and v to the caches, of y   as rope_store_ without head norms
What a step of a small model takes is launches, not bytes: 10 a layer become 5 (docs/performance.md#gpu). Larger
matrices, whose bytes are their time, stay with linear_rows.py: `is_small`. So do more rows than MOST_FUSED_ROWS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from .dependent_launch import dependent_launch
from .linear_rows import BLOCK_K
from .scaled_weights import ScaledWeights
from .written_rounding import WRITTEN_ROUNDING

MOST_FUSED_ROWS = 16  # one tile: every program reads all rows
_ROWS = 16
_MOST_BYTES = 1 << 24  # of weights, 4 us at an H200's bandwidth; beyond, tiles that read further ahead are worth more
_MOST_NORMED = 1 << 14  # values that a program norms, 128 registers a thread
NUM_STAGES = 5  # of what is behind those that are held: 4 blocks of weights in flight
_PROGRAMS = 66  # as many halve the tiles no more: half of an H100's or H200's multiprocessors
_LEAST_USED = 16  # outputs of a tile
_MOST_HELD = 8  # blocks of weights in shared memory, 128 KiB of 16 bits, and 32 of rows
_MOST_LINES = 32  # of a weight's row in the L2: 2,048 inputs of 16 bits

NO_NORM = {"HAS_NORM": False, "NORM_ROWS": 1, "NORM_BLOCK": 1}

AnyWeights: TypeAlias = torch.Tensor | ScaledWeights


@dataclass(frozen=True, slots=True)
class Normed:
    """Rows [T, K] float32, normed by `weight` [K] float32 before they are multiplied."""

    rows: torch.Tensor
    weight: torch.Tensor
    eps: float


def is_small(weights: AnyWeights) -> bool:
    """Whether launches and not bytes are what a product of few rows by `weights` takes."""
    return weights.nbytes <= _MOST_BYTES


def can_norm(num_rows: int, in_size: int) -> bool:
    """Whether rows may be given as `Normed`: a program has all of them in registers."""
    return _norm_rows(num_rows) * _power_of_two(in_size) <= _MOST_NORMED


def linear_add_(residual: torch.Tensor, x: torch.Tensor, weights: AnyWeights, bias: torch.Tensor | None = None) -> None:
    """residual [T, N] float32 += the linear of x [T, K]; T at most MOST_FUSED_ROWS."""
    from .linear_fused_triton import linear_add_kernel

    values, scales = _parts(weights)
    num_rows, out_size = residual.shape
    assert x.shape == (num_rows, values.shape[1]) and out_size == values.shape[0], (x.shape, residual.shape)
    assert residual.dtype == torch.float32 and residual.stride(1) == x.stride(1) == 1
    used = _used(out_size)
    linear_add_kernel[(-(-out_size // used),)](
        residual, x, values, residual if scales is None else scales, x if bias is None else bias,
        num_rows, values.shape[1], out_size, residual.stride(0), x.stride(0), values.stride(0),
        USED=used, **_options(x.dtype, num_rows, values, scales, bias),
    )  # fmt: skip


def linear_gated(
    x: torch.Tensor | Normed, weights: AnyWeights, bias: torch.Tensor | None, kind: str, dtype: torch.dtype
) -> torch.Tensor:
    """out [T, I] in `dtype` of the linear [T, 2 I], gate before up; `kind` as in gated_activation."""
    from .linear_fused_triton import linear_gated_kernel

    values, scales = _parts(weights)
    rows, norm, eps, norm_options = _rows_of(x)
    num_rows, size = rows.shape[0], values.shape[0] // 2
    assert rows.shape[1] == values.shape[1] and rows.stride(1) == 1, (rows.shape, values.shape)
    out = torch.empty(num_rows, size, dtype=dtype, device=rows.device)
    used = _used(2 * size)
    linear_gated_kernel[(-(-2 * size // used),)](
        out, rows, values, rows if scales is None else scales, rows if bias is None else bias, norm,
        num_rows, values.shape[1], size, rows.stride(0), values.stride(0), eps,
        GELU=kind == "gelu_tanh", USED=used, **norm_options, **_options(dtype, num_rows, values, scales, bias),
    )  # fmt: skip
    return out


def linear_rope_(
    x: torch.Tensor | Normed,
    weights: AnyWeights,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """The rotated q [T, Hq * D] of the linear [T, (Hq + 2 Hkv) * D]; k and v go to the caches. See rope_store_."""
    from .linear_fused_triton import linear_rope_kernel

    values, scales = _parts(weights)
    rows, norm, eps, norm_options = _rows_of(x)
    num_rows, num_kv_heads, head_dim = rows.shape[0], k_cache.shape[1], k_cache.shape[2]
    cos, sin = cos.view(-1, head_dim), sin.view(-1, head_dim)
    assert values.shape[0] == (num_heads + 2 * num_kv_heads) * head_dim, (values.shape, num_heads, k_cache.shape)
    assert rows.shape[1] == values.shape[1] and rows.stride(1) == 1 and cos.is_contiguous() and sin.is_contiguous()
    assert k_cache.stride()[1:] == v_cache.stride()[1:] == (head_dim, 1), (k_cache.stride(), v_cache.stride())
    q = torch.empty(num_rows, num_heads * head_dim, dtype=k_cache.dtype, device=rows.device)
    used = _used(values.shape[0])
    linear_rope_kernel[(-(-values.shape[0] // used),)](
        q, rows, values, rows if scales is None else scales, rows if bias is None else bias, norm,
        cos, sin, slot_mapping, k_cache, v_cache,
        num_rows, values.shape[1], rows.stride(0), values.stride(0), k_cache.stride(0), v_cache.stride(0), eps,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, USED=used,
        **norm_options, **_options(q.dtype, num_rows, values, scales, bias),
    )  # fmt: skip
    return q


def _parts(weights: AnyWeights) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Values [N, K] and scales [N], if there are."""
    values, scales = (weights, None) if isinstance(weights, torch.Tensor) else (weights.values, weights.scales)
    assert values.stride(1) == 1 and values.stride(0) * values.dtype.itemsize % 16 == 0, values.stride()
    return values, scales


def _rows_of(x: torch.Tensor | Normed) -> tuple[torch.Tensor, torch.Tensor, float, dict[str, Any]]:
    """(rows, norm, eps, what a launch says of them)."""
    if isinstance(x, torch.Tensor):
        return x, x, 0.0, NO_NORM
    num_rows, in_size = x.rows.shape
    assert can_norm(num_rows, in_size) and x.weight.is_contiguous(), x.rows.shape
    return x.rows, x.weight, x.eps, norm_sizes(num_rows, in_size)


def norm_sizes(num_rows: int, in_size: int) -> dict[str, Any]:
    """What a launch says of rows that it norms."""
    return {"HAS_NORM": True, "NORM_ROWS": _norm_rows(num_rows), "NORM_BLOCK": _power_of_two(in_size)}


def _options(
    dtype: torch.dtype, num_rows: int, values: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None
) -> dict[str, Any]:
    """What all launches say."""
    import triton.language as tl

    assert 0 < num_rows <= MOST_FUSED_ROWS, num_rows
    of_triton = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
    flags = {"HAS_SCALES": scales is not None, "HAS_BIAS": bias is not None, "DTYPE": of_triton}
    sizes = {"ROWS": _ROWS, "BLOCK_K": BLOCK_K, "num_warps": 4, "num_stages": NUM_STAGES}
    ahead = ahead_of_wait(values.shape[1], values.itemsize)
    return flags | sizes | ahead | WRITTEN_ROUNDING | dependent_launch(values.device)


def ahead_of_wait(in_size: int, itemsize: int) -> dict[str, Any]:
    """What a program reads of its weights before it waits: blocks into shared memory, and more into the L2.

    Weights of 8 bits go to the tensor cores by way of registers, which do not hold more than a block or two.
    """
    num_held = min(_MOST_HELD, -(-in_size // BLOCK_K)) if itemsize == 2 else 0
    lines = _power_of_two(-(-in_size * itemsize // 128))  # of 128 bytes, of a weight's row
    return {"HELD": num_held, "HAS_REST": num_held * BLOCK_K < in_size, "LINES": min(_MOST_LINES, lines)}


def _used(out_size: int) -> int:
    """Outputs of a tile: fewer than its 64 where so many would occupy few multiprocessors."""
    used = 64
    while used > _LEAST_USED and -(-out_size // used) < _PROGRAMS:
        used //= 2
    return used


def _norm_rows(num_rows: int) -> int:
    return next(rows for rows in (1, 4, MOST_FUSED_ROWS) if num_rows <= rows)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
