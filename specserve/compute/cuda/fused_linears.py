"""Which of a layer's linears take norms, rotation, activation and the residual's addition along, where rows are few.

Decided once, at start: where the products keep one order of sums (one_order.py), so that a row has the same bits in a
step of few rows and of many; for matrices that are small (`linear_fused.is_small`), by groups of GROUPS. That a fused
linear has the bits of the launches whose place it takes is checked on the device. SPECSERVE_FUSED_LINEARS=off in the
environment leaves all of them apart, until both ways were measured on a card.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence as Seq

import torch

from ...kernels.add_norm import add_rms_norm_
from ...kernels.gated_activation import gated_activation
from ...kernels.linear_fused import MOST_FUSED_ROWS, Normed, can_norm, is_small, linear_add_, linear_gated, linear_rope_
from ...kernels.rope_kv import rope_store_
from ...model.config import ModelConfig
from ..decoder_weights import GROUPS, AnyLinear, Layer

logger = logging.getLogger(__name__)

_COLUMNS_OF_K = 16  # K is a multiple of it, or weights would be read by less than 16 bytes
_CHECKED_ROWS = (1, 3, MOST_FUSED_ROWS)


def activation_kind(config: ModelConfig) -> str:
    """The name of the MLP's activation in kernels/gated_activation.py."""
    return "silu" if config.activation == "silu" else "gelu_tanh"


def fused_groups(config: ModelConfig, layers: Seq[Layer], dtype: torch.dtype, device: torch.device) -> frozenset[str]:
    """The groups that are fused; `layers` keep one order of sums, with activations of `dtype`."""
    if os.environ.get("SPECSERVE_FUSED_LINEARS") == "off":
        logger.info("linears of few rows are apart from norms and activations: SPECSERVE_FUSED_LINEARS=off")
        return frozenset()
    groups = {group for group in GROUPS if _can_be(group, layers[0])}
    if device.type == "cuda":
        differing = {group for group in groups if _differs(group, config, layers[0], dtype, device)}
        if differing:
            groups -= differing
            logger.warning("fused linears have other bits here and are left apart: %s", ", ".join(sorted(differing)))
    return frozenset(groups)


def _can_be(group: str, layer: Layer) -> bool:
    """All layers have one shape. A norm of whole outputs, or of heads, needs more of a row than a program has."""
    linear: AnyLinear = getattr(layer, group)
    norms = {"qkv": layer.q_norm, "o": layer.post_attention_norm, "gate_up": None, "down": layer.post_mlp_norm}
    weights, _ = linear.parts()
    return norms[group] is None and is_small(weights) and linear.in_size % _COLUMNS_OF_K == 0


def _differs(group: str, config: ModelConfig, layer: Layer, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a fused linear has other bits than the launches whose place it takes."""
    linear: AnyLinear = getattr(layer, group)
    (weights, bias), kind = linear.parts(), activation_kind(config)
    generator = torch.Generator(device).manual_seed(0)
    normal = torch.empty(MOST_FUSED_ROWS, linear.in_size, device=device).normal_(generator=generator)
    norm = torch.ones(linear.in_size, device=device)
    for num_rows in _CHECKED_ROWS:
        rows = normal[:num_rows]
        x = add_rms_norm_(rows, None, norm, config.rms_norm_eps, out=torch.empty_like(rows, dtype=dtype))
        given = Normed(rows, norm, config.rms_norm_eps) if can_norm(num_rows, linear.in_size) else x
        y = linear(x)
        if group == "gate_up":
            apart, fused = gated_activation(y, kind), linear_gated(given, weights, bias, kind, dtype)
        elif group == "qkv":
            apart, fused = _rotated(config, y, num_rows), _fused_rotated(config, given, linear, num_rows, dtype, device)
        else:
            apart = torch.zeros(y.shape, device=device)
            fused = apart.clone()
            add_rms_norm_(apart, y, torch.ones_like(apart[0]), config.rms_norm_eps)
            linear_add_(fused, x, weights, bias)
        if not torch.equal(apart, fused):  # sync: at start
            return True
    return False


def _rotation(
    config: ModelConfig, num_rows: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cos, sin, slot_mapping) of some rows."""
    angles = torch.linspace(0, 6, num_rows * config.head_dim, device=device).view(num_rows, config.head_dim)
    return angles.cos(), angles.sin(), torch.arange(num_rows, device=device)


def _caches(config: ModelConfig, num_rows: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(2, num_rows, config.num_kv_heads, config.head_dim, dtype=dtype, device=device)


def _rotated(config: ModelConfig, qkv: torch.Tensor, num_rows: int) -> torch.Tensor:
    """q, and behind it what the caches hold, by rope_store_."""
    k, v = _caches(config, num_rows, qkv.dtype, qkv.device)
    cos, sin, slots = _rotation(config, num_rows, qkv.device)
    rope_store_(qkv, cos, sin, slots, k, v, config.num_heads, config.num_kv_heads, None, None, 0.0)
    q = qkv[:, : config.num_heads * config.head_dim]
    return torch.cat([part.reshape(num_rows, -1) for part in (q, k, v)], 1)


def _fused_rotated(
    config: ModelConfig, x: torch.Tensor | Normed, qkv: AnyLinear, num_rows: int, dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:  # fmt: skip
    k, v = _caches(config, num_rows, dtype, device)
    (weights, bias), (cos, sin, slots) = qkv.parts(), _rotation(config, num_rows, device)
    q = linear_rope_(x, weights, bias, cos, sin, slots, k, v, config.num_heads)
    return torch.cat([part.reshape(num_rows, -1) for part in (q, k, v)], 1)
