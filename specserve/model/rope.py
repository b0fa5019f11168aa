"""Rotary position embeddings (Su et al. 2021, "RoFormer") in the variants that the supported models use.

Owns the frequencies, cos and sin of a step's positions, and the rotation. Half-split convention, as on the hub. There
is no table by position: at 131072 positions it would take 128 MiB, and a step's own rows cost a few small operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import ModelError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_OLD_NAMES = {"su": "longrope"}
_NO_LIMIT = 2**31
NO_ROTATION = "none"  # no model's file says so: layers without positions are named otherwise


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One rotary embedding; `rope_type` is one of `ROPE_TYPES`, or `NO_ROTATION`."""

    rope_type: str
    theta: float
    head_dim: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0  # yarn only, as the next three
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0  # multiplies cos and sin
    partial: int | None = None  # dimensions of a head that positions turn; None: all
    short_factors: tuple[float, ...] = ()  # longrope only: of wavelengths

    @property
    def rotary_dim(self) -> int:
        return self.head_dim if self.partial is None else self.partial

    @property
    def most_positions(self) -> int:
        """longrope has other factors for texts that are longer than those of the training, from the first token on."""
        return self.original_max_position_embeddings if self.rope_type == "longrope" else _NO_LIMIT

    @property
    def stretched_positions(self) -> int:
        """What yarn stretches to, where max_position_embeddings may name what it stretches; 0 for the others."""
        return int(self.factor * self.original_max_position_embeddings) if self.rope_type == "yarn" else 0


@dataclass(frozen=True, slots=True)
class QueryGrowth:
    """Queries grow with their positions, so that attention to long texts does not fade: Llama 4's way of Nakanishi's
    Scalable-Softmax (2025)."""

    beta: float
    length: int  # positions, after each of which they grow

    def factors(self, positions: torch.Tensor) -> torch.Tensor:
        """1 + beta * ln(1 + position // length), float32 of the shape of `positions`."""
        return 1.0 + self.beta * torch.log(1.0 + torch.floor(positions / self.length))


def rope_config(raw: dict[str, Any], layer_type: str, head_dim: int) -> RopeConfig:
    """The rotary embedding of layers of `layer_type`, from either form of config.json."""
    params = raw.get("rope_parameters") or {}
    outer = raw
    if layer_type in params:
        params, outer = params[layer_type] or {}, {}
    if not params:
        local = layer_type == "sliding_attention" and raw.get("rope_local_base_freq") is not None
        theta = raw["rope_local_base_freq"] if local else raw.get("rope_theta", 10000.0)
        params = {"rope_theta": theta, **({} if local else raw.get("rope_scaling") or {})}
    rope_type = params.get("rope_type") or params.get("type") or "default"
    rope_type = _OLD_NAMES.get(rope_type, rope_type)
    if rope_type not in ROPE_TYPES:
        raise ModelError(f"rope type {rope_type!r} is not supported; served are {', '.join(ROPE_TYPES)}")
    share = params.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0
    rotary_dim = int(head_dim * share)
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise ModelError(f"partial_rotary_factor={share!r} is not supported with heads of {head_dim}")
    original = outer.get("original_max_position_embeddings") or params.get("original_max_position_embeddings")
    original = int(original or raw.get("max_position_embeddings", 8192))
    factor, attention_factor = 1.0, 1.0
    if rope_type in ("yarn", "longrope"):
        factor = float(params.get("factor") or raw["max_position_embeddings"] / original)
        of_type = _yarn_attention_factor if rope_type == "yarn" else _longrope_attention_factor
        attention_factor = of_type(params, factor, original)
    elif rope_type != "default":
        factor = float(params["factor"])
    if not 0 < factor < math.inf:
        raise ModelError(f"the factor {factor} of rope type {rope_type!r} must be a number above 0")
    short_factors = tuple(float(value) for value in params["short_factor"]) if rope_type == "longrope" else ()
    if short_factors and len(short_factors) != rotary_dim // 2:
        raise ModelError(f"short_factor has {len(short_factors)} entries; wanted are {rotary_dim // 2}")
    return RopeConfig(
        rope_type,
        float(params.get("rope_theta") or raw.get("rope_theta", 10000.0)),
        head_dim,
        factor,
        float(params.get("low_freq_factor") or 1.0),
        float(params.get("high_freq_factor") or 4.0),
        original,
        float(params.get("beta_fast") or 32.0),
        float(params.get("beta_slow") or 1.0),
        bool(params.get("truncate", True)),
        attention_factor,
        None if rotary_dim == head_dim else rotary_dim,
        short_factors,
    )


def _longrope_attention_factor(params: dict[str, Any], factor: float, original: int) -> float:
    if params.get("attention_factor") is not None:
        return float(params["attention_factor"])
    return math.sqrt(1.0 + math.log(factor) / math.log(original)) if factor > 1.0 else 1.0


def _yarn_attention_factor(params: dict[str, Any], factor: float, _original: float) -> float:
    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if params.get("attention_factor") is not None:
        return float(params["attention_factor"])
    mscale, mscale_all_dim = params.get("mscale"), params.get("mscale_all_dim")
    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def inverse_frequencies(config: RopeConfig) -> torch.Tensor:
    """[D / 2] float32 radians per position, 0 behind those of `rotary_dim`.

    llama3: long wavelengths rescaled; yarn: Peng et al. 2023; longrope: Ding et al. 2024. dynamic stretches
    only texts beyond max_position_embeddings, which are not served.

    Layers without positions (NoPE, Kazemnejad et al. 2023) turn by nothing, which changes no bit of what is turned.
    """
    if config.rope_type == NO_ROTATION:
        return torch.zeros(config.head_dim // 2)
    if config.partial is not None:
        turned = inverse_frequencies(replace(config, head_dim=config.partial, partial=None))
        return F.pad(turned, (0, (config.head_dim - config.partial) // 2))
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    if config.rope_type == "longrope":
        return 1.0 / (torch.tensor(config.short_factors) * config.theta**exponents)
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
    if config.rope_type == "yarn":
        low, high = (_yarn_dim(config, turns) for turns in (config.beta_fast, config.beta_slow))
        if config.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, config.head_dim - 1)
        if low == high:
            high += 0.001
        ramp = ((torch.arange(config.head_dim // 2).float() - low) / (high - low)).clamp(0, 1)
        return inv_freq / config.factor * ramp + inv_freq * (1 - ramp)
    return inv_freq


def _yarn_dim(config: RopeConfig, num_turns: float) -> float:
    """The dimension that turns `num_turns` times within the original context."""
    return (
        config.head_dim
        * math.log(config.original_max_position_embeddings / (num_turns * 2 * math.pi))
        / (2 * math.log(config.theta))
    )


class Rope:
    """One rotary embedding on its device."""

    def __init__(self, config: RopeConfig, device: torch.device):
        self._inv_freq = inverse_frequencies(config).to(device)
        self._is_scaled = config.attention_factor != 1.0
        scales = torch.full((config.rotary_dim // 2,), config.attention_factor)
        self._scales = F.pad(scales, (0, (config.head_dim - config.rotary_dim) // 2), value=1.0).to(device)  # [D / 2]

    def cos_sin(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, 1, D] at `positions` [T]; the rotation's sign is folded into sin. Angles are float32."""
        angles = torch.outer(positions.float(), self._inv_freq)  # [T, D / 2]
        cos, sin = angles.cos(), angles.sin()
        if self._is_scaled:
            cos, sin = cos * self._scales, sin * self._scales
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
        return cos.unsqueeze(1).to(dtype), sin.unsqueeze(1).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads x [T, heads, D] by cos, sin [T, 1, D] of their positions."""
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
    return (x * cos).addcmul_(swapped, sin)
