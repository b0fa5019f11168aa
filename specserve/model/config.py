"""What a decoder needs to know of a model, read from a Hugging Face config.json.

Owns the differences between architectures: everything below here asks this struct, never for a model's name. Both the
`rope_parameters` of transformers 5 and the older `rope_theta` / `rope_scaling` are read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError
from .rope import NO_ROTATION, RopeConfig, rope_config

GLM = {
    "rms_norm_eps": 1.5625e-7,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "attention_out_bias": False,
}
# What transformers assumes for a missing key where that is not what `_parse` assumes for every architecture.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"sliding_window": 4096},
    "Qwen2ForCausalLM": {"sliding_window": 4096, "attention_out_bias": False},
    "Qwen3ForCausalLM": {"sliding_window": 4096, "head_dim": 128},
    "SmolLM3ForCausalLM": {
        "num_key_value_heads": 4,
        "rope_theta": 2_000_000.0,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    "Phi3ForCausalLM": {"rms_norm_eps": 1e-5, "attention_bias": False},
    "GraniteForCausalLM": {
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    "GraniteMoeHybridForCausalLM": {
        "embedding_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "num_local_experts": 8,
        "shared_intermediate_size": 1024,
    },
    "Olmo2ForCausalLM": {"rms_norm_eps": 1e-5},
    "Olmo3ForCausalLM": {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096},
    "Exaone4ForCausalLM": {"rms_norm_eps": 1e-5, "num_key_value_heads": 32, "sliding_window": 4096},
    "GlmForCausalLM": GLM,
    "Glm4ForCausalLM": GLM,
    "SeedOssForCausalLM": {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "attention_bias": True,
        "attention_out_bias": False,
    },
    "Ernie4_5ForCausalLM": {
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    },
    "Gemma2ForCausalLM": {
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "Gemma3ForCausalLM": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "hidden_activation": "gelu_pytorch_tanh",
    },
}
# Models that see images, of which the language model is served: its architecture, from its own part of config.json.
LANGUAGE_MODELS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
MODEL_TYPES = {  # for a config.json without `architectures`
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "glm": "GlmForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3": "Gemma3ForConditionalGeneration",
}
GEMMAS = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
LAYER_TYPES = ("full_attention", "sliding_attention")
PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
PARTLY_ROTATED = ("Phi3ForCausalLM", "GlmForCausalLM", "Glm4ForCausalLM")
OLMO = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
GRANITE = ("GraniteForCausalLM", "GraniteMoeHybridForCausalLM")
# Where norms stand if not before attention and before the MLP alone: the names of those before, and of those behind.
NORMS = {
    **dict.fromkeys(GEMMAS, ((PRE_NORMS[0], "pre_feedforward_layernorm"), POST_NORMS)),
    "Glm4ForCausalLM": (PRE_NORMS, ("post_self_attn_layernorm", "post_mlp_layernorm")),
    **dict.fromkeys((*OLMO, "Exaone4ForCausalLM"), ((), POST_NORMS)),
}
# Linears that a model has as one, or by another name: see `shapes.JOINED`.
LINEARS_JOINED = {
    "Phi3ForCausalLM": ("qkv_proj", "gate_up_proj"),
    "GraniteMoeHybridForCausalLM": ("input_linear", "output_linear"),
    **dict.fromkeys(("GlmForCausalLM", "Glm4ForCausalLM"), ("gate_up_proj",)),
}
HEADS_NORMED = ("Qwen3ForCausalLM", "Gemma3ForCausalLM", "Exaone4ForCausalLM", *OLMO)
NEIGHBOURS_TURNED = ("GlmForCausalLM", "Glm4ForCausalLM", "Ernie4_5ForCausalLM")
NO_ROPE = "no_rope"  # in `rope_keys`: layers that know no positions
GRANITE_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
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
    qk_norm: bool  # RMSNorm over each head of q and k
    qk_norm_whole: bool  # OLMo has it over all heads of q as one, and of k
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

    def embed_scale_of(self, dtype: torch.dtype) -> float:
        """What embeddings of weights in `dtype` are multiplied by."""
        return float(torch.tensor(self.embed_scale, dtype=dtype)) if self.embed_scale_is_rounded else self.embed_scale

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Read `path`/config.json. Raises `ModelError` for what is not supported, by name."""
        file = Path(path) / "config.json"
        try:
            raw = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise ModelError(f"{path} has no config.json; a Hugging Face model directory is expected") from None
        except ValueError as error:
            raise ModelError(f"{file} is not valid JSON: {error}") from None
        try:
            return _parse(raw)
        except KeyError as error:
            raise ModelError(f"{file} has no {error.args[0]!r}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{file} has a value of the wrong type: {error}") from None


def _parse(raw: dict[str, Any]) -> ModelConfig:
    names = raw.get("architectures") or [MODEL_TYPES.get(raw.get("model_type", ""), raw.get("model_type"))]
    architecture = names[0]
    sees_images = architecture in LANGUAGE_MODELS
    if sees_images:
        architecture, raw = LANGUAGE_MODELS[architecture], raw["text_config"]
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"architecture {architecture} is not supported; served are {', '.join((*ARCHITECTURES, *LANGUAGE_MODELS))}"
        )
    raw = {**ARCHITECTURES[architecture], **raw}
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
    if architecture == "GraniteMoeHybridForCausalLM":
        raw = _dense_granite(raw)
    if architecture == "Ernie4_5ForCausalLM":
        raw |= dict.fromkeys(("attention_bias", "mlp_bias"), raw.get("use_bias"))
    if architecture == "Olmo3ForCausalLM":
        raw.setdefault("rope_local_base_freq", raw["rope_theta"])  # layers with windows have no scaling
    gemma = architecture in GEMMAS
    embed_scale = raw["hidden_size"] ** 0.5 if gemma else 1.0
    attention_scale = None
    logits_divisor = 1.0
    if architecture in GRANITE:
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
    if architecture == "Exaone4ForCausalLM" and raw["sliding_window"]:  # only what is in windows knows positions
        turned = [kind == "sliding_attention" for kind in layer_types]
        raw |= {"no_rope_layer_interval": 1, "no_rope_layers": turned}
    window = raw.get("sliding_window")
    if window is not None and window < 1:
        raise ModelError(f"sliding_window={window} must be at least 1")
    windows = tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    rope_keys = _rope_keys(raw, layer_types)
    ropes = {
        key: RopeConfig(NO_ROTATION, 1.0, head_dim) if key == NO_ROPE else rope_config(raw, key, head_dim)
        for key in set(rope_keys)
    }
    rotary_dim = min(rope.rotary_dim for rope in ropes.values())
    if rotary_dim != head_dim and architecture not in PARTLY_ROTATED:
        raise ModelError(
            f"rotary embeddings of {rotary_dim} of {head_dim} dimensions are not supported in {architecture}"
        )
    qkv_bias = bool(raw.get("attention_bias", False)) or architecture == "Qwen2ForCausalLM"
    pre_norms, post_norms = NORMS.get(architecture, (PRE_NORMS, ()))
    return ModelConfig(
        architecture=architecture,
        sees_images=sees_images,
        joined=LINEARS_JOINED.get(architecture, ()),
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
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", gemma)),
        qkv_bias=qkv_bias,
        o_bias=bool(raw.get("attention_out_bias", qkv_bias)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=architecture in HEADS_NORMED,
        qk_norm_whole=architecture in OLMO,
        norm_offset=1.0 if gemma else 0.0,
        pre_norms=pre_norms,
        post_norms=post_norms,
        embed_scale=embed_scale,
        embed_scale_is_rounded=gemma,
        attention_scale=attention_scale or (raw["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
        logits_divisor=logits_divisor,
        attention_softcap=_softcap(raw, "attn_logit_softcapping") if architecture == "Gemma2ForCausalLM" else None,
        final_softcap=_softcap(raw, "final_logit_softcapping"),
        windows=windows,
        rotary_dim=rotary_dim,
        turns_neighbours=architecture in NEIGHBOURS_TURNED,
        rope_keys=rope_keys,
        ropes=ropes,
    )


def _dense_granite(raw: dict[str, Any]) -> dict[str, Any]:
    """What a Granite 4 without experts and recurrent layers says, as Granite 3 would say it."""
    kinds = {*(raw.get("layer_types") or ["mamba"])} - {"attention", "full_attention"}
    if kinds or raw["num_local_experts"]:
        found = ", ".join(sorted(kinds)) or f"num_local_experts={raw['num_local_experts']}"
        raise ModelError(f"a Granite 4 with {found} is not supported; served are those of attention and an MLP alone")
    turned = {} if raw.get("position_embedding_type") == "rope" else {"no_rope_layer_interval": 1}
    return raw | {"intermediate_size": raw["shared_intermediate_size"], "mlp_bias": False} | turned


def _multiplier(raw: dict[str, Any], key: str) -> float:
    if not isinstance(raw[key], int | float) or not 0 < raw[key] < math.inf:
        raise ModelError(f"{key}={raw[key]!r} must be a number above 0")
    return float(raw[key])


def _softcap(raw: dict[str, Any], key: str) -> float | None:
    return None if raw.get(key) is None else _multiplier(raw, key)


def _layer_types(raw: dict[str, Any], architecture: str) -> list[str]:
    """Per layer "sliding_attention" or "full_attention"."""
    num_layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
    qwen = architecture in ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
    gemma = architecture in GEMMAS
    olmo = architecture == "Olmo3ForCausalLM"
    turns_by_type = gemma or olmo  # layer types choose the rotary embedding too
    smollm = architecture == "SmolLM3ForCausalLM"
    exaone = architecture == "Exaone4ForCausalLM"
    slides = turns_by_type or exaone or architecture in ("MistralForCausalLM", "Phi3ForCausalLM")
    slides = slides or ((qwen or smollm) and bool(raw.get("use_sliding_window")))
    if not slides or (window is None and not turns_by_type):
        return ["full_attention"] * num_layers
    if raw.get("layer_types"):
        types = list(raw["layer_types"])
        unknown = sorted(set(types) - set(LAYER_TYPES))
        if unknown or len(types) != num_layers:
            wanted = f"{num_layers} of {' and '.join(LAYER_TYPES)}"
            raise ModelError(f"layer_types has {len(types)} entries {unknown or ''}; wanted are {wanted}")
        return types
    if turns_by_type or exaone:
        usual = {"Gemma2ForCausalLM": 2, "Gemma3ForCausalLM": 6}.get(architecture, 4)
        pattern = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or usual
        pattern = len(pattern) if isinstance(pattern, str) else pattern  # EXAONE's "LLLG"
        return ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(num_layers)]
    if smollm:
        return ["full_attention" if rotates else "sliding_attention" for rotates in _rotating_layers(raw)]
    first = raw.get("max_window_layers", 28) if qwen else 0
    return ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]


def _rope_keys(raw: dict[str, Any], layer_types: list[str]) -> tuple[str, ...]:
    """Per layer its type, which chooses the rotary embedding, or `NO_ROPE`."""
    return tuple(kind if rotates else NO_ROPE for kind, rotates in zip(layer_types, _rotating_layers(raw), strict=True))


def _rotating_layers(raw: dict[str, Any]) -> list[bool]:
    """Per layer whether positions rotate its queries and keys: in SmolLM3 not in every fourth."""
    num_layers, interval = raw["num_hidden_layers"], raw.get("no_rope_layer_interval")
    given = raw.get("no_rope_layers") if interval else None
    if given is None:
        return [not interval or (idx + 1) % interval != 0 for idx in range(num_layers)]
    if len(given) < num_layers:
        raise ModelError(f"no_rope_layers has {len(given)} entries; wanted are {num_layers}, one of each layer")
    return [bool(rotates) for rotates in given[:num_layers]]
