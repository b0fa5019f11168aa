"""What a decoder needs to know of a model, read from a Hugging Face config.json.

Owns the differences between architectures: everything below here asks this struct, never for a model's name. Both the
`rope_parameters` of transformers 5 and the older `rope_theta` / `rope_scaling` are read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from .architectures import ARCHITECTURES, GRANITE_MULTIPLIERS, MODEL_TYPES, OLDER_NAMES, Architecture
from .language_part import LANGUAGE_MODELS, language_part
from .own_head import has_own_head
from .rope import NO_ROTATION, QueryGrowth, RopeConfig, rope_config

LAYER_TYPES = ("full_attention", "sliding_attention")
NO_ROPE = "no_rope"  # in `rope_keys`: layers that know no positions
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and switches of a decoder-only model; lengths in tokens, sizes in elements."""

    architecture: str
    sees_images: bool  # the directory also holds what text does not go through
    joined: tuple[str, ...]  # linears there that are several of ours, or have other names: see `shapes.JOINED`
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    activation: str
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: tuple[str, ...]  # on each head of q, and of k
    qk_norm_whole: bool  # OLMo has it on all heads of q as one, and of k
    qk_norm_turned: bool  # HunYuan on heads that positions have turned
    norm_offset: float  # Gemma multiplies by 1 + weight
    pre_norms: tuple[str, ...]  # on the inputs of attention and MLP, by their names on the hub; OLMo has none
    post_norms: tuple[str, ...]  # on the outputs of both: Gemma, OLMo, GLM
    embed_scale: float
    embed_scale_is_rounded: bool  # Gemma's is, to the weights' dtype
    attention_scale: float
    logits_divisor: float  # the final norm's factors are divided by it, and what is pooled is multiplied
    attention_softcap: float | None  # of scores; None: no cap, as in the next one
    final_softcap: float | None  # of logits
    windows: tuple[int | None, ...]  # per layer: tokens a row sees, itself included; None is all
    rotary_dim: int  # of each head, what positions turn
    turns_neighbours: bool  # in pairs that lie side by side; else half of what is turned apart
    rope_keys: tuple[str, ...]  # per layer: which entry of `ropes`
    ropes: dict[str, RopeConfig]
    query_growth: QueryGrowth | None  # of queries by their positions, behind their rotation

    def embed_scale_of(self, dtype: torch.dtype) -> float:
        """What embeddings of weights in `dtype` are multiplied by."""
        return float(torch.tensor(self.embed_scale, dtype=dtype)) if self.embed_scale_is_rounded else self.embed_scale

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Read `path`/config.json, and by the weights, where there are any, whether the lm_head is the embedding.

        Raises `ModelError` for what is not supported, by name.
        """
        file = Path(path) / "config.json"
        try:
            raw = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise ModelError(f"{path} has no config.json; a Hugging Face model directory is expected") from None
        except ValueError as error:
            raise ModelError(f"{file} is not valid JSON: {error}") from None
        try:
            config = _parse(raw)
        except KeyError as error:
            raise ModelError(f"{file} has no {error.args[0]!r}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{file} has a value of the wrong type: {error}") from None
        if config.tie_word_embeddings and has_own_head(file.parent):
            return replace(config, tie_word_embeddings=False)
        return config


def _parse(raw: dict[str, Any]) -> ModelConfig:
    names = raw.get("architectures") or [MODEL_TYPES.get(raw.get("model_type", ""), raw.get("model_type"))]
    name = OLDER_NAMES.get(names[0], names[0])
    sees_images = name in LANGUAGE_MODELS
    if sees_images:
        raw = language_part(raw, name)
        name = MODEL_TYPES.get(raw["model_type"], raw["model_type"])
    if name not in ARCHITECTURES:
        served = ", ".join((*ARCHITECTURES, *LANGUAGE_MODELS))
        raise ModelError(f"architecture {name} is not supported; served are {served}")
    architecture = ARCHITECTURES[name]
    raw = architecture.rewritten({**architecture.assumed, **raw})
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"the weights are quantized ({method}); served are plain float32, bfloat16 and float16")
    activation = raw.get("hidden_activation") or raw.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise ModelError(f"activation {activation!r} is not supported; served are {', '.join(ACTIVATIONS)}")
    for key in SIZES:
        if not isinstance(raw[key], int) or raw[key] < 1:
            raise ModelError(f"{key}={raw[key]!r} must be a whole number of at least 1")
    rms_norm_eps = raw.get("rms_norm_eps", 1e-6)
    if not isinstance(rms_norm_eps, int | float) or not 0 <= rms_norm_eps < math.inf:
        raise ModelError(f"rms_norm_eps={rms_norm_eps!r} must be a number of at least 0")
    if raw.get("use_bidirectional_attention"):
        raise ModelError(f"use_bidirectional_attention={raw['use_bidirectional_attention']!r} is not supported")
    gemma = architecture.is_gemma
    embed_scale = raw["hidden_size"] ** 0.5 if gemma else 1.0
    attention_scale, logits_divisor = None, 1.0
    if architecture.has_multipliers:
        embed, attention_scale, residual, logits_divisor = (_multiplier(raw, key) for key in GRANITE_MULTIPLIERS)
        # Outputs that are multiplied before they are added to the residual stream are the same as a stream that is
        # divided: its norms are, but for eps.
        embed_scale, rms_norm_eps = embed / residual, rms_norm_eps / residual**2
    num_heads = raw["num_attention_heads"]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // num_heads
    num_kv_heads = raw.get("num_key_value_heads") or num_heads
    if head_dim % 2 or num_heads % num_kv_heads:
        raise ModelError(
            f"head_dim={head_dim} must be even, and {num_heads} heads a multiple of {num_kv_heads} KV heads"
        )
    layer_types = _layer_types(raw, architecture)
    window = raw.get("sliding_window")
    if window is not None and window < 1:
        raise ModelError(f"sliding_window={window} must be at least 1")
    windows = tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    turned = _rotating_layers(raw)
    if architecture.turns_windows_only and window is not None:
        turned = [kind == "sliding_attention" for kind in layer_types]
    kinds = [kind if is_turned else NO_ROPE for kind, is_turned in zip(layer_types, turned, strict=True)]
    rope_keys, ropes = _ropes(raw, kinds, head_dim)
    rotary_dim = min(rope.rotary_dim for rope in ropes.values())
    if rotary_dim != head_dim and not architecture.turns_parts:
        raise ModelError(f"rotary embeddings of {rotary_dim} of {head_dim} dimensions are not supported in {name}")
    qkv_bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=name,
        sees_images=sees_images,
        joined=architecture.joined,
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=min(
            max(raw["max_position_embeddings"], *(rope.stretched_positions for rope in ropes.values())),
            *(rope.most_positions for rope in ropes.values()),
        ),
        rms_norm_eps=rms_norm_eps,
        activation=activation,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
        o_bias=bool(raw.get("attention_out_bias", qkv_bias)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=architecture.qk_norm,
        qk_norm_whole=architecture.qk_norm_whole,
        qk_norm_turned=architecture.qk_norm_turned,
        norm_offset=1.0 if gemma else 0.0,
        pre_norms=architecture.pre_norms,
        post_norms=architecture.post_norms,
        embed_scale=embed_scale,
        embed_scale_is_rounded=gemma,
        attention_scale=attention_scale or (raw["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
        logits_divisor=logits_divisor,
        attention_softcap=_softcap(raw, "attn_logit_softcapping") if architecture.caps_scores else None,
        final_softcap=_softcap(raw, "final_logit_softcapping"),
        windows=windows,
        rotary_dim=rotary_dim,
        turns_neighbours=architecture.turns_neighbours,
        rope_keys=rope_keys,
        ropes=ropes,
        query_growth=_query_growth(raw, ropes) if architecture.grows_queries else None,
    )


def _multiplier(raw: dict[str, Any], key: str) -> float:
    if not isinstance(raw[key], int | float) or not 0 < raw[key] < math.inf:
        raise ModelError(f"{key}={raw[key]!r} must be a number above 0")
    return float(raw[key])


def _softcap(raw: dict[str, Any], key: str) -> float | None:
    return None if raw.get(key) is None else _multiplier(raw, key)


def _query_growth(raw: dict[str, Any], ropes: dict[str, RopeConfig]) -> QueryGrowth | None:
    beta = (raw.get("rope_parameters") or raw.get("rope_scaling") or {}).get("llama_4_scaling_beta")
    (rope,) = ropes.values()
    return QueryGrowth(float(beta), rope.original_max_position_embeddings) if beta else None


def _ropes(raw: dict[str, Any], kinds: list[str], head_dim: int) -> tuple[tuple[str, ...], dict[str, RopeConfig]]:
    """`rope_keys` and `ropes` of layers of `kinds`: equal ones once, in the same order at every start."""
    keys: dict[str, str] = {}
    ropes: dict[str, RopeConfig] = {}
    for kind in dict.fromkeys(kinds):
        rope = RopeConfig(NO_ROTATION, 1.0, head_dim) if kind == NO_ROPE else rope_config(raw, kind, head_dim)
        keys[kind] = next((key for key, known in ropes.items() if known == rope), kind)
        ropes[keys[kind]] = rope
    return tuple(keys[kind] for kind in kinds), ropes


def _layer_types(raw: dict[str, Any], architecture: Architecture) -> list[str]:
    """Per layer "sliding_attention" or "full_attention"."""
    num_layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
    slides = bool(raw.get("use_sliding_window")) if architecture.slides is None else architecture.slides
    if not slides or (window is None and not architecture.turns_by_type):
        return ["full_attention"] * num_layers
    if raw.get("layer_types"):
        types = list(raw["layer_types"])
        unknown = sorted(set(types) - set(LAYER_TYPES))
        if unknown or len(types) != num_layers:
            wanted = f"{num_layers} of {' and '.join(LAYER_TYPES)}"
            raise ModelError(f"layer_types has {len(types)} entries {unknown or ''}; wanted are {wanted}")
        return types
    if architecture.full_every:
        pattern = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or architecture.full_every
        pattern = len(pattern) if isinstance(pattern, str) else pattern  # EXAONE's "LLLG"
        is_full = [(idx + 1) % pattern == 0 for idx in range(num_layers)]
    elif "no_rope_layer_interval" in raw:
        is_full = _rotating_layers(raw)
    else:
        first = raw["max_window_layers"] if architecture.slides is None else 0
        is_full = [idx < first for idx in range(num_layers)]
    return ["full_attention" if full else "sliding_attention" for full in is_full]


def _rotating_layers(raw: dict[str, Any]) -> list[bool]:
    """Per layer whether positions rotate its queries and keys: in SmolLM3 not in every fourth."""
    num_layers, interval = raw["num_hidden_layers"], raw.get("no_rope_layer_interval")
    given = raw.get("no_rope_layers") if interval else None
    if given is None:
        return [not interval or (idx + 1) % interval != 0 for idx in range(num_layers)]
    if len(given) < num_layers:
        raise ModelError(f"no_rope_layers has {len(given)} entries; wanted are {num_layers}, one of each layer")
    return [bool(rotates) for rotates in given[:num_layers]]
