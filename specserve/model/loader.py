"""Loads a model directory strictly: safetensors only, every tensor accounted for.

A missing, unexpected or mis-shaped tensor is an error that names it, with the shape found and the shape wanted; a model
that loads is the model on disk. Tensors are read one by one, so that the peak is the model plus one layer.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import safetensors
import torch

from ..errors import ModelError
from ..kernels.linear import Linear, compute_dtype, packs_weights
from .config import ModelConfig
from .decoder import Decoder, Layer

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_NAMED = 5  # tensors named in one message


class TensorSource:
    """The tensors of a directory's safetensors files, handed out once each."""

    def __init__(self, path: Path):
        files = _weight_files(path)
        try:
            self._files = [safetensors.safe_open(file, framework="pt") for file in files]
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{path}: the weights are not readable as safetensors: {error}") from None
        self._file_of = {name: file for file in self._files for name in file.keys()}
        self._unused = set(self._file_of)
        self._problems: list[str] = []

    def has(self, name: str) -> bool:
        return name in self._file_of

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor, or zeros of its shape and a problem noted for `check`."""
        self._unused.discard(name)
        if name not in self._file_of:
            self._problems.append(f"{name} {list(shape)} is missing")
            return torch.zeros(shape)
        tensor = self._file_of[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            self._problems.append(f"{name} has shape {list(tensor.shape)}, wanted {list(shape)}")
            return torch.zeros(shape)
        return tensor

    def ignore(self, name: str) -> None:
        self._unused.discard(name)

    def dtype(self) -> torch.dtype:
        """The dtype of the embedding: what the checkpoint was saved in."""
        name = "model.embed_tokens.weight"
        if name not in self._file_of:
            return torch.float32
        return self._file_of[name].get_slice(name)[:1].dtype

    def check(self, path: Path) -> None:
        unexpected = sorted(name for name in self._unused if not name.endswith("rotary_emb.inv_freq"))
        problems = self._problems + [f"{name} is not part of this architecture" for name in unexpected]
        if problems:
            more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
            raise ModelError(f"{path} does not fit its config.json: {'; '.join(problems[:MAX_NAMED])}{more}")


def load_model(path: str | Path, device: torch.device, dtype: str = "auto") -> Decoder:
    """Read the model directory `path` onto `device`. `dtype` is auto (as saved), fp32, bf16 or fp16."""
    path = Path(path)
    config = ModelConfig.from_dir(path)
    source = TensorSource(path)
    weight_dtype = source.dtype() if dtype == "auto" else DTYPES[dtype]
    activations = compute_dtype(weight_dtype, device)
    if packs_weights(weight_dtype, device):
        logger.info("this CPU has no fast %s products: weights are packed as fp16, arithmetic is fp32", weight_dtype)

    def weight(name: str, *shape: int) -> torch.Tensor:
        return source.take(name, shape).to(device, weight_dtype)

    def norm(name: str, size: int) -> torch.Tensor:
        weight = source.take(name, (size,)).float() + config.norm_offset
        # 1 + weight is not representable in 16 bits, so Gemma's norms stay float32, as in transformers.
        return weight.to(device, torch.float32 if config.norm_offset else activations)

    def linear(prefix: str, parts: list[tuple[str, int]], size_in: int, bias: bool) -> Linear:
        weights = [weight(f"{prefix}.{name}.weight", size_out, size_in) for name, size_out in parts]
        biases = [weight(f"{prefix}.{name}.bias", size_out) for name, size_out in parts] if bias else []
        return Linear(torch.cat(weights), torch.cat(biases) if biases else None)

    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    embed = weight("model.embed_tokens.weight", config.vocab_size, hidden)
    layers = []
    for idx in range(config.num_layers):
        base = f"model.layers.{idx}"
        attention, mlp = f"{base}.self_attn", f"{base}.mlp"
        before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
        layers.append(
            Layer(
                input_norm=norm(f"{base}.input_layernorm.weight", hidden),
                qkv=linear(
                    attention, [("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)], hidden, config.qkv_bias
                ),
                q_norm=norm(f"{attention}.q_norm.weight", config.head_dim) if config.qk_norm else None,
                k_norm=norm(f"{attention}.k_norm.weight", config.head_dim) if config.qk_norm else None,
                o=linear(attention, [("o_proj", hidden)], q_size, config.o_bias),
                post_attention_norm=norm(f"{base}.post_attention_layernorm.weight", hidden)
                if config.post_norms
                else None,
                mlp_norm=norm(f"{base}.{before_mlp}.weight", hidden),
                gate_up=linear(mlp, [("gate_proj", inner), ("up_proj", inner)], hidden, config.mlp_bias),
                down=linear(mlp, [("down_proj", hidden)], inner, config.mlp_bias),
                post_mlp_norm=norm(f"{base}.post_feedforward_layernorm.weight", hidden) if config.post_norms else None,
            )
        )
    final_norm = norm("model.norm.weight", hidden)
    if config.tie_word_embeddings:
        source.ignore("lm_head.weight")
        lm_head = Linear(embed)
    else:
        lm_head = Linear(weight("lm_head.weight", config.vocab_size, hidden))
    source.check(path)
    return Decoder(config, embed, layers, final_norm, lm_head, activations, weight_dtype)


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index: {error}") from None
        files = [path / name for name in names]
        missing = [file.name for file in files if not file.is_file() or file.parent != path]
        if missing:
            raise ModelError(f"{path} lacks {', '.join(missing[:MAX_NAMED])}, which its index names")
        return files
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    found = sorted(file.name for file in path.glob("*.bin"))
    hint = f"; {found[0]} is a pickle and is never loaded: save with safe_serialization=True" if found else ""
    raise ModelError(f"{path} has no model.safetensors{hint}")
