"""Which of a layer's linears take norms, rotation, activation and the residual's addition along, where rows are few.

Decided once, at start: where the products keep one order of sums (one_order.py), so that a row has the same bits in a
step of few rows and of many; for matrices that are small (`linear_fused.is_small`), by groups of GROUPS. That a fused
linear has the bits of the launches whose place it takes is checked on the device. SPECSERVE_FUSED_LINEARS=off in the
environment leaves all of them apart, until both ways were measured on a card.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
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
_CHECKED_ROWS = (1, 3, MOST_FUSED_ROWS)  # at once: each has a norm of its own
_ROWS_OF_EACH = 256  # for what shows in most rows; that norms round alike is written_rounding.py's matter


def activation_kind(config: ModelConfig) -> str:
    """The name of the MLP's activation in kernels/gated_activation.py."""
    return "silu" if config.activation == "silu" else "gelu_tanh"


def fused_groups(config: ModelConfig, layers: Seq[Layer], dtype: torch.dtype, device: torch.device) -> frozenset[str]:
    """The groups that are fused; `layers` keep one order of sums, with activations of `dtype`."""
    if os.environ.get("SPECSERVE_FUSED_LINEARS") == "off":
        logger.info("linears of few rows are apart from norms and activations: SPECSERVE_FUSED_LINEARS=off")
        return frozenset()
    groups = frozenset(group for group in GROUPS if _can_be(group, layers[0]))
    if device.type == "cuda":
        groups -= _left_apart(groups, config, layers[0], dtype, device)
    names = ", ".join(sorted(groups)) or "none"
    logger.info("linears that take along what stands around them, of up to %d rows: %s", MOST_FUSED_ROWS, names)
    return groups


def _left_apart(
    groups: Collection[str], config: ModelConfig, layer: Layer, dtype: torch.dtype, device: torch.device
) -> set[str]:
    """Those of `groups` whose fused linears have other bits on this device, or do not run there."""
    left: set[str] = set()
    for group in sorted(groups):
        try:
            if not _differs(group, config, layer, dtype, device):
                continue
            logger.warning("fused linears of %s have other bits here and are left apart", group)
        except Exception:  # whatever a compiler or a driver that nobody tried has to say: the launches apart serve
            logger.exception("fused linears of %s do not run here and are left apart", group)
        left.add(group)
    return left


def _can_be(group: str, layer: Layer) -> bool:
    """All layers have one shape. A norm of whole outputs, or of heads, needs more of a row than a program has."""
    linear: AnyLinear = getattr(layer, group)
    norms = {"qkv": layer.q_norm, "o": layer.post_attention_norm, "gate_up": None, "down": layer.post_mlp_norm}
    weights, _ = linear.parts()
    return norms[group] is None and is_small(weights) and linear.in_size % _COLUMNS_OF_K == 0


def _differs(group: str, config: ModelConfig, layer: Layer, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a fused linear has other bits than the launches whose place it takes, of rows that are like a model's."""
    generator = torch.Generator(device).manual_seed(0)
    differs = torch.zeros((), dtype=torch.bool, device=device)
    for num_rows in _CHECKED_ROWS:
        for _ in range(-(-_ROWS_OF_EACH // num_rows)):
            apart, fused = _both_ways(group, config, layer, dtype, num_rows, generator)
            differs |= (apart != fused).any()
    return bool(differs)  # sync: at start


def _both_ways(
    group: str, config: ModelConfig, layer: Layer, dtype: torch.dtype, num_rows: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the launches apart make of some rows, and what the fused one does."""
    linear: AnyLinear = getattr(layer, group)
    (weights, bias), eps, device = linear.parts(), config.rms_norm_eps, generator.device

    def normal(size: int) -> torch.Tensor:
        return torch.empty(num_rows, size, device=device).normal_(generator=generator)

    rows, added = normal(linear.in_size), normal(linear.in_size).to(dtype)
    if group in ("o", "down"):
        y = linear(added)
        apart = normal(y.shape[1])
        fused = apart.clone()
        add_rms_norm_(apart, y, torch.ones_like(apart[0]), eps)
        linear_add_(fused, added, weights, bias)
        return apart, fused
    norm = layer.input_norm if group == "qkv" else layer.mlp_norm
    given: torch.Tensor | Normed
    given = x = add_rms_norm_(rows, added, norm, eps)  # as a step of more rows does
    if norm is not None and can_norm(num_rows, linear.in_size):
        given = Normed(rows, norm, eps)
    if group == "qkv":
        return _rotated(config, linear(x), num_rows), _fused_rotated(config, given, linear, num_rows, dtype, device)
    kind = activation_kind(config)
    return gated_activation(linear(x), kind), linear_gated(given, weights, bias, kind, dtype)


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
