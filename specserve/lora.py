"""Reads a PEFT LoRA directory and checks all of it before anything is served with it.

Owns the PEFT format: safetensors only, everything that PEFT writes for plain LoRA on the linears, the embedding and the
lm_head. What we cannot serve exactly (DoRA, trained biases, modules_to_save, initialisations that change the base) is
refused with one sentence. A `LoraAdapter` is immutable; its content hash, over configuration and weights, is its
identity.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from .adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, open_adapter
from .errors import AdapterError
from .kernels.lora_stack import LoraPair
from .lookahead import BaseIdentity, Lookahead, read_lookahead
from .messages import AdapterInfo
from .model.config import ModelConfig

# The fused linears of a layer, in the order of their columns.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
_PARENT = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn") | dict.fromkeys(
    ("gate_proj", "up_proj", "down_proj"), "mlp"
)
_REFUSED_FEATURES = {
    "use_dora": "DoRA",
    "lora_bias": "a bias in lora_B",
    "modules_to_save": "modules_to_save (fully trained modules)",
    "trainable_token_indices": "trainable token embeddings",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "megatron_config": "Megatron parallel layers",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "auto_map": "remote code",
}
_REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_WEIGHT_NAME = re.compile(
    r"base_model\.model\.(?P<module>(?:model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<name>\w+))|lm_head)"
    r"\.lora_(?P<side>[AB])\.weight"
)
_EMBED_NAME = re.compile(r"base_model\.model\.(?P<module>model\.embed_tokens)\.lora_embedding_(?P<side>[AB])")
_BASE_NAME = re.compile(r"base_model\.model\.(?P<module>model\.embed_tokens|lm_head)\.(?:base_layer\.)?weight")

BaseTensor = Callable[[str], torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """One adapter's weights, and alpha / rank as `scale`.

    In PEFT orientation, A [R, in] and B [out, R]; those of layers as the decoder's `lay_out_lora` has them.
    """

    name: str
    content_hash: str
    layers: dict[tuple[int, str], LoraPair]  # (layer, module) -> weights; untargeted modules are absent
    embed: LoraPair | None  # A [R, V], B [H, R]
    lm_head: LoraPair | None
    max_rank: int
    text_hash: str | None  # of the chat template and tokenizer that it brings
    lookahead: Lookahead | None = None  # what drafts for it; None for a plain LoRA

    @property
    def pairs(self) -> list[LoraPair]:
        return [*self.layers.values(), *(pair for pair in (self.embed, self.lm_head) if pair is not None)]

    def info(self) -> AdapterInfo:
        modules = sorted({module for _, module in self.layers})
        modules += [name for name, pair in (("embed_tokens", self.embed), ("lm_head", self.lm_head)) if pair]
        return AdapterInfo(
            content_hash=self.content_hash,
            max_rank=self.max_rank,
            num_modules=len(self.pairs),
            target_modules=modules,
            size_bytes=sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs),
            text_hash=self.text_hash,
            lookahead=self.lookahead.info() if self.lookahead is not None else None,
        )


def module_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear that a LoRA may target."""
    q_size = config.num_heads * config.head_dim
    kv_size = config.num_kv_heads * config.head_dim
    return {
        "q_proj": (config.hidden_size, q_size),
        "k_proj": (config.hidden_size, kv_size),
        "v_proj": (config.hidden_size, kv_size),
        "o_proj": (q_size, config.hidden_size),
        "gate_proj": (config.hidden_size, config.intermediate_size),
        "up_proj": (config.hidden_size, config.intermediate_size),
        "down_proj": (config.intermediate_size, config.hidden_size),
        "lm_head": (config.hidden_size, config.vocab_size),
        "embed_tokens": (config.vocab_size, config.hidden_size),
    }


def read_adapter(
    path: str | Path,
    config: ModelConfig,
    *,
    name: str | None = None,
    max_rank: int = 256,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    lay_out: Callable[[LoraPair], LoraPair] = lambda pair: pair,
    base_tensor: BaseTensor | None = None,
    base: BaseIdentity | None = None,
) -> LoraAdapter:
    """Read and check the PEFT directory `path` for a base model of shape `config`.

    Weights are converted to `dtype` (default: as stored) on `device`, those of layers held as `lay_out` has them.
    `base_tensor(hub_name)` gives the base model's weights, to check copies of the embedding that PEFT stores beside an
    embedding LoRA. With `base`, the lookahead files beside the LoRA are read too; when they do not fit, the LoRA is
    served without them. Raises `AdapterError`.
    """
    path = Path(path)
    name = name or path.name
    with open_adapter(path, name, max_weights_bytes=_max_weights_bytes(config, max_rank)) as files:
        if CONFIG_FILE not in files.paths:
            raise AdapterError(f"adapter {name!r}: {path} has no {CONFIG_FILE}; a PEFT LoRA directory is expected")
        if WEIGHTS_FILE not in files.paths:
            raise AdapterError(f"adapter {name!r} has no {WEIGHTS_FILE}{_other_weights(path)}")
        return _read_files(files, name, config, max_rank, dtype, device, lay_out, base_tensor, base)


def _read_files(
    files: AdapterFiles,
    name: str,
    config: ModelConfig,
    max_rank: int,
    dtype: torch.dtype | None,
    device: torch.device | str,
    lay_out: Callable[[LoraPair], LoraPair],
    base_tensor: BaseTensor | None,
    base: BaseIdentity | None,
) -> LoraAdapter:
    peft = _read_config(files.paths[CONFIG_FILE], name)
    try:
        with safetensors.safe_open(files.paths[WEIGHTS_FILE], framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # not a dict: it has no iterator
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"adapter {name!r}: {WEIGHTS_FILE} is not readable as safetensors: {error}") from None
    sides = _sort_tensors(name, tensors, config, base_tensor)
    if not sides:
        raise AdapterError(f"adapter {name!r}: {WEIGHTS_FILE} holds no LoRA tensors")
    shapes = module_shapes(config)
    layers: dict[tuple[int, str], LoraPair] = {}
    extra: dict[str, LoraPair] = {}
    highest = 0
    for module, pair in sides.items():
        short = module.rsplit(".", 1)[-1]
        a, b = _check_pair(name, module, pair, shapes[short], max_rank)
        rank = a.shape[0]
        highest = max(highest, rank)
        declared = _pattern_value(peft.get("rank_pattern"), module, peft["r"])
        if declared != rank:
            raise AdapterError(f"adapter {name!r}: {module} has rank {rank} but {CONFIG_FILE} says {declared}")
        alpha = _pattern_value(peft.get("alpha_pattern"), module, peft["lora_alpha"])
        scale = alpha / math.sqrt(rank) if peft.get("use_rslora") else alpha / rank
        kept = LoraPair(a.to(device, dtype or a.dtype), b.to(device, dtype or b.dtype), scale)
        if short in ("embed_tokens", "lm_head"):
            extra[short] = kept
        else:
            layers[int(module.split(".")[2]), short] = lay_out(kept)
    lookahead = None
    if base is not None:
        lookahead = read_lookahead(files.paths, files.digests[WEIGHTS_FILE].hex(), name, config, base, device)
    embed, lm_head = extra.get("embed_tokens"), extra.get("lm_head")
    return LoraAdapter(name, files.content_hash, layers, embed, lm_head, highest, files.text_hash, lookahead)


def _max_weights_bytes(config: ModelConfig, max_rank: int) -> int:
    """What the largest adapter takes in fp64, with copies of the embeddings and room for the header."""
    shapes = module_shapes(config)
    num_values = sum((size_in + size_out) * max_rank for size_in, size_out in shapes.values()) * config.num_layers
    num_values += 2 * config.vocab_size * config.hidden_size
    return 8 * num_values + 100_000_000


def _other_weights(path: Path) -> str:
    """What stands in the place of the weights file, for the error message."""
    found = sorted(entry.name for entry in path.glob("adapter_model*"))
    if any(".safetensors" in file for file in found):
        return f"; {found[0]} is one part of a weights file that was split; join the parts into one {WEIGHTS_FILE}"
    if found:
        return f"; {found[0]} is not read: .bin and .pt files are pickles; save with safe_serialization=True"
    return ""


def _read_config(path: Path, name: str) -> dict[str, Any]:
    """The adapter_config.json at `path`, with everything refused that we cannot serve exactly."""
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"adapter {name!r}: {CONFIG_FILE} is not valid JSON: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"adapter {name!r}: peft_type is {found!r}; only 'LORA' is served")
    for key, feature in _REFUSED_FEATURES.items():
        if config.get(key):
            raise AdapterError(f"adapter {name!r} uses {feature} ({key}), which is not supported; retrain without it")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"adapter {name!r} has trained biases (bias={config['bias']!r}); only bias='none' is served")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_REFUSED_INITS):
        raise AdapterError(
            f"adapter {name!r} was initialised by {init!r}, which changes the base weights; convert it to a plain LoRA "
            "with save_pretrained(path_initial_model_for_weight_conversion=...) and init_lora_weights=true"
        )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise AdapterError(f"adapter {name!r}: {key} is {value!r}; a positive number is expected")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise AdapterError(f"adapter {name!r}: {key} is not an object")
    return config


def _pattern_value(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module name wins."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            continue
    return default


def _sort_tensors(
    name: str, tensors: dict[str, torch.Tensor], config: ModelConfig, base_tensor: BaseTensor | None
) -> dict[str, dict[str, torch.Tensor]]:
    """module -> {"A": ..., "B": ...}; anything unexpected is an error that names it."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if match := _BASE_NAME.fullmatch(key):
            _check_base_copy(name, key, match["module"], tensor, base_tensor)
            continue
        match = _WEIGHT_NAME.fullmatch(key) or _EMBED_NAME.fullmatch(key)
        groups = match.groupdict() if match else {}
        module_name = groups.get("name")
        if not match or (module_name is not None and module_name not in _PARENT):
            raise AdapterError(
                f"adapter {name!r}: tensor {key!r} is not a LoRA weight of a supported module "
                f"({', '.join(_PARENT)}, embed_tokens, lm_head)"
            )
        if module_name is not None:
            if f".{_PARENT[module_name]}.{module_name}" not in key:
                raise AdapterError(f"adapter {name!r}: tensor {key!r} names a module that the model does not have")
            if int(groups["layer"]) >= config.num_layers:
                raise AdapterError(f"adapter {name!r}: {key!r} is beyond the model's {config.num_layers} layers")
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    return sides


def _check_base_copy(name: str, key: str, module: str, tensor: torch.Tensor, base_tensor: BaseTensor | None) -> None:
    """PEFT stores the base embedding beside an embedding LoRA: harmless if unchanged, unservable if it was trained."""
    base = base_tensor(f"{module}.weight") if base_tensor else None
    if base is None:
        return
    if tuple(base.shape) != tuple(tensor.shape):
        raise AdapterError(
            f"adapter {name!r}: {key} is {list(tensor.shape)} but the base model's is {list(base.shape)}; "
            "a resized vocabulary is not supported"
        )
    if not torch.allclose(base.float(), tensor.float(), atol=1e-2, rtol=1e-2):
        raise AdapterError(
            f"adapter {name!r}: {key} differs from the base model's; a trained embedding is not supported"
        )


def _check_pair(
    name: str, module: str, pair: dict[str, torch.Tensor], shape: tuple[int, int], max_rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if missing := {"A", "B"} - set(pair):
        raise AdapterError(f"adapter {name!r}: {module} has no lora_{missing.pop()} weight")
    a, b = pair["A"], pair["B"]
    for side, tensor, want_text in (("A", a, f"[rank, {shape[0]}]"), ("B", b, f"[{shape[1]}, rank]")):
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise AdapterError(
                f"adapter {name!r}: {module} lora_{side} is {tensor.dtype} {list(tensor.shape)}; "
                f"a floating-point matrix {want_text} is expected"
            )
    rank, size_in, size_out = a.shape[0], *shape
    if not 1 <= rank <= max_rank:
        raise AdapterError(f"adapter {name!r}: {module} has rank {rank}; 1 to {max_rank} is served (--max-lora-rank)")
    for side, tensor, want in (("A", a, (rank, size_in)), ("B", b, (size_out, rank))):
        if tuple(tensor.shape) != want:
            raise AdapterError(
                f"adapter {name!r}: {module} lora_{side} has shape {list(tensor.shape)}, the base model wants "
                f"{list(want)}; was it trained for another base?"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"adapter {name!r}: {module} lora_{side} holds NaN or infinite values")
    return a, b
