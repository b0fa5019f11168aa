"""Rotary position embeddings (Su et al. 2021, "RoFormer") in the variants that the supported models use.

Owns the frequencies and the cos/sin tables; the rotation itself is one function. Half-split convention, as on the hub.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ModelError


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One rotary embedding; `rope_type` is default, linear or llama3."""

    rope_type: str
    theta: float
    head_dim: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def rope_config(raw: dict[str, Any], layer_type: str, head_dim: int) -> RopeConfig:
    """The rotary embedding of layers of `layer_type`, from either form of config.json."""
    params = raw.get("rope_parameters") or {}
    if layer_type in params:
        params = params[layer_type] or {}
    if not params:
        local = layer_type == "sliding_attention" and raw.get("rope_local_base_freq") is not None
        theta = raw["rope_local_base_freq"] if local else raw.get("rope_theta", 10000.0)
        params = {"rope_theta": theta, **({} if local else raw.get("rope_scaling") or {})}
    rope_type = params.get("rope_type") or params.get("type") or "default"
    if rope_type not in ("default", "linear", "llama3"):
        raise ModelError(f"rope type {rope_type!r} is not supported; served are default, linear and llama3")
    if params.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"partial_rotary_factor={params['partial_rotary_factor']} is not supported; only 1.0 is")
    return RopeConfig(
        rope_type,
        float(params.get("rope_theta") or raw.get("rope_theta", 10000.0)),
        head_dim,
        float(params.get("factor") or 1.0),
        float(params.get("low_freq_factor") or 1.0),
        float(params.get("high_freq_factor") or 4.0),
        int(params.get("original_max_position_embeddings") or raw.get("max_position_embeddings", 8192)),
    )


def inverse_frequencies(config: RopeConfig) -> torch.Tensor:
    """[D / 2] float32 radians per position. llama3: Llama 3.1's rescaling of long wavelengths."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inv_freq = 1.0 / (config.theta**exponents)
    if config.rope_type == "linear":
        return inv_freq / config.factor
    if config.rope_type == "llama3":
        wavelen = 2 * math.pi / inv_freq
        original = config.original_max_position_embeddings
        smooth = (original / wavelen - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        blended = (1 - smooth) * inv_freq / config.factor + smooth * inv_freq
        long = wavelen > original / config.low_freq_factor
        short = wavelen < original / config.high_freq_factor
        return torch.where(long, inv_freq / config.factor, torch.where(short, inv_freq, blended))
    return inv_freq


def rope_table(config: RopeConfig, num_positions: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[2, num_positions, 1, D]: cos, and sin with the sign of the rotation's first half folded in."""
    angles = torch.outer(torch.arange(num_positions).float(), inverse_frequencies(config))  # [P, D / 2]
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
    return table.unsqueeze(2).to(device, dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads x [T, heads, D] by cos, sin [T, 1, D] of their positions."""
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    return (x * cos).addcmul_(swapped, sin)
