"""The architectures that are served: what follows from a model's name, an entry each.

Read by `config.py` alone, which makes sizes and switches of an entry and a config.json. An entry says what transformers
assumes for keys that the file may leave out, and what its code does without asking the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ModelError

BEFORE = ("input_layernorm", "post_attention_layernorm")
BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
QK = ("q_norm", "k_norm")
_GEMMA_BEFORE = ("input_layernorm", "pre_feedforward_layernorm")
GRANITE_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


def _as_it_is(raw: dict[str, Any]) -> dict[str, Any]:
    return raw


@dataclass(frozen=True, slots=True)
class Architecture:
    """One class of transformers. Norms are named as on the hub: those of attention, then those of the MLP."""

    model_type: str  # for a config.json without `architectures`
    assumed: Mapping[str, Any] = field(default_factory=dict)  # for missing keys, where `config.py` would assume others
    rewritten: Callable[[dict[str, Any]], dict[str, Any]] = _as_it_is  # config.json in the keys of Llama's
    pre_norms: tuple[str, ...] = BEFORE  # on inputs
    post_norms: tuple[str, ...] = ()  # on outputs
    qk_norm: tuple[str, ...] = ()  # over each head of q, and of k
    qk_norm_whole: bool = False  # or over all of them as one
    qk_norm_turned: bool = False  # or over heads that positions have turned
    joined: tuple[str, ...] = ()  # linears that are several of ours, or have other names: see `shapes.JOINED`
    turns_parts: bool = False  # positions may turn a part of each head
    turns_neighbours: bool = False  # in pairs that lie side by side
    turns_by_type: bool = False  # layers with windows have a rotary embedding of their own
    turns_windows_only: bool = False  # where there are windows, layers without know no positions
    slides: bool | None = False  # whether layers have windows; None: if use_sliding_window says so
    full_every: int = 0  # without `layer_types`, which layers have no window: each so-manieth; 0: none
    caps_scores: bool = False  # attn_logit_softcapping
    grows_queries: bool = False  # llama_4_scaling_beta
    has_multipliers: bool = False  # GRANITE_MULTIPLIERS
    is_gemma: bool = False  # norms by 1 + weight, embeddings by the root of their size, query_pre_attn_scalar


def _qwen2(raw: dict[str, Any]) -> dict[str, Any]:
    return raw | {"attention_bias": True, "attention_out_bias": False}


def _olmo3(raw: dict[str, Any]) -> dict[str, Any]:
    """Older files do not say that layers with windows have no scaling of positions."""
    return {"rope_local_base_freq": raw["rope_theta"], **raw}


def _ernie(raw: dict[str, Any]) -> dict[str, Any]:
    return raw | dict.fromkeys(("attention_bias", "mlp_bias"), raw.get("use_bias"))


def _dense_granite(raw: dict[str, Any]) -> dict[str, Any]:
    """Granite 4 has one MLP a layer in models without experts, and attention alone in some."""
    kinds = {*(raw.get("layer_types") or ["mamba"])} - {"attention", "full_attention"}
    if kinds or raw["num_local_experts"]:
        found = ", ".join(sorted(kinds)) or f"num_local_experts={raw['num_local_experts']}"
        raise ModelError(f"a Granite 4 with {found} is not supported; served are those of attention and an MLP alone")
    turned = {} if raw.get("position_embedding_type") == "rope" else {"no_rope_layer_interval": 1}
    return raw | {"intermediate_size": raw["shared_intermediate_size"], "mlp_bias": False} | turned


def _hunyuan(raw: dict[str, Any]) -> dict[str, Any]:
    """What it calls dynamic stretches texts of all lengths alike, by `alpha`."""
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not found.get("alpha"):
        return raw
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    theta = found.get("rope_theta") or raw.get("rope_theta", 10000.0)
    stretched = theta * found["alpha"] ** (head_dim / (head_dim - 2))
    return raw | {"rope_parameters": {"rope_type": "default", "rope_theta": stretched}}


_MISTRAL = {"num_attention_heads": 32, "num_key_value_heads": 8}
_MINISTRAL = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
_QWEN = {"sliding_window": 4096, "max_window_layers": 28}
_GRANITE = dict.fromkeys(GRANITE_MULTIPLIERS, 1.0)
_SEED = {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "attention_out_bias": False}
_GLM = {
    "rms_norm_eps": 1.5625e-7,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "attention_out_bias": False,
}
_GEMMA = {
    "num_key_value_heads": 4,
    "sliding_window": 4096,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama"),
    "MistralForCausalLM": Architecture(
        "mistral",
        _MISTRAL | {"vocab_size": 32_000, "max_position_embeddings": 131_072, "sliding_window": 4096},
        slides=True,
    ),
    "Ministral3ForCausalLM": Architecture(
        "ministral3",
        _MISTRAL
        | {
            "vocab_size": 131_072,
            "max_position_embeddings": 262_144,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "rope_scaling": _MINISTRAL,
        },
        slides=True,
        grows_queries=True,
    ),
    "Qwen2ForCausalLM": Architecture("qwen2", _QWEN, _qwen2, slides=None),
    "Qwen3ForCausalLM": Architecture("qwen3", _QWEN | {"head_dim": 128}, qk_norm=QK, slides=None),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        {
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
        slides=None,
    ),
    "Phi3ForCausalLM": Architecture(
        "phi3",
        {"rms_norm_eps": 1e-5, "attention_bias": False},
        joined=("qkv_proj", "gate_up_proj"),
        turns_parts=True,
        slides=True,
    ),
    "GraniteForCausalLM": Architecture("granite", _GRANITE, has_multipliers=True),
    "GraniteMoeHybridForCausalLM": Architecture(
        "granitemoehybrid",
        _GRANITE | {"num_local_experts": 8, "shared_intermediate_size": 1024},
        _dense_granite,
        joined=("input_linear", "output_linear"),
        has_multipliers=True,
    ),
    "Olmo2ForCausalLM": Architecture(
        "olmo2", {"rms_norm_eps": 1e-5}, pre_norms=(), post_norms=BEHIND, qk_norm=QK, qk_norm_whole=True
    ),
    "Olmo3ForCausalLM": Architecture(
        "olmo3",
        {"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096},
        _olmo3,
        pre_norms=(),
        post_norms=BEHIND,
        qk_norm=QK,
        qk_norm_whole=True,
        turns_by_type=True,
        slides=True,
        full_every=4,
    ),
    "Exaone4ForCausalLM": Architecture(
        "exaone4",
        {"rms_norm_eps": 1e-5, "num_key_value_heads": 32, "sliding_window": 4096},
        pre_norms=(),
        post_norms=BEHIND,
        qk_norm=QK,
        turns_windows_only=True,
        slides=True,
        full_every=4,
    ),
    "GlmForCausalLM": Architecture("glm", _GLM, joined=("gate_up_proj",), turns_parts=True, turns_neighbours=True),
    "Glm4ForCausalLM": Architecture(
        "glm4",
        _GLM,
        post_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
        joined=("gate_up_proj",),
        turns_parts=True,
        turns_neighbours=True,
    ),
    "SeedOssForCausalLM": Architecture("seed_oss", _SEED),
    "Ernie4_5ForCausalLM": Architecture(
        "ernie4_5",
        {
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rope_theta": 500_000.0,
            "tie_word_embeddings": True,
        },
        _ernie,
        turns_neighbours=True,
    ),
    "HunYuanDenseV1ForCausalLM": Architecture(
        "hunyuan_v1_dense",
        {"rms_norm_eps": 1e-5},
        _hunyuan,
        qk_norm=("query_layernorm", "key_layernorm"),
        qk_norm_turned=True,
    ),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        pre_norms=_GEMMA_BEFORE,
        post_norms=BEHIND,
        slides=True,
        full_every=2,
        caps_scores=True,
        is_gemma=True,
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3_text",
        _GEMMA
        | {
            "vocab_size": 262_208,
            "num_attention_heads": 8,
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        pre_norms=_GEMMA_BEFORE,
        post_norms=BEHIND,
        qk_norm=QK,
        turns_by_type=True,
        slides=True,
        full_every=6,
        is_gemma=True,
    ),
}
OLDER_NAMES = {"Ernie4_5_ForCausalLM": "Ernie4_5ForCausalLM"}  # of files from before transformers had the class
MODEL_TYPES = {  # for a config.json without `architectures`
    **{architecture.model_type: name for name, architecture in ARCHITECTURES.items()},
    "gemma3": "Gemma3ForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
}
