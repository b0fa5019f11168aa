"""Loads a model directory strictly: safetensors only, every tensor accounted for.

A missing, unexpected or mis-shaped tensor is an error that names it, with the shape found and the shape wanted; a model
that loads is the model on disk. Names, shapes and dtypes are checked by the files' headers before anything is read;
tensors are then read one by one, so that the peak is the model plus one layer.
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
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by their names in safetensors
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_NAMED = 5  # tensors named in one message


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model directory, by its name on the hub, with its shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q_size, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q_size, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.post_norms:
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,) for name, size in norms.items()}
    for name, (size_out, size_in, bias) in linears.items():
        layer[f"{name}.weight"] = (size_out, size_in)
        if bias:
            layer[f"{name}.bias"] = (size_out,)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    for idx in range(config.num_layers):
        shapes |= {f"model.layers.{idx}.{name}": shape for name, shape in layer.items()}
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return shapes


class TensorSource:
    """The tensors of a directory's safetensors files."""

    def __init__(self, path: Path):
        try:
            files = [safetensors.safe_open(file, framework="pt") for file in _weight_files(path)]
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{path}: the weights are not readable as safetensors: {error}") from None
        self._path = path
        self._file_of = {name: file for file in files for name in file.keys()}

    def check(self, shapes: dict[str, tuple[int, ...]], ignored: tuple[str, ...]) -> None:
        """Raise unless the files hold exactly `shapes`, by their headers: nothing is read, nothing is allocated."""
        problems = []
        for name, shape in shapes.items():
            if name not in self._file_of:
                problems.append(f"{name} {list(shape)} is missing")
                continue
            header = self._file_of[name].get_slice(name)
            if tuple(header.get_shape()) != shape:
                problems.append(f"{name} has shape {header.get_shape()}, wanted {list(shape)}")
            elif header.get_dtype() not in STORED:
                problems.append(f"{name} has dtype {header.get_dtype()}, wanted {', '.join(STORED)}")
        unexpected = sorted(name for name in self._file_of.keys() - shapes.keys() if not name.endswith(ignored))
        problems += [f"{name} is not part of this architecture" for name in unexpected]
        if problems:
            more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
            raise ModelError(f"{self._path} does not fit its config.json: {'; '.join(problems[:MAX_NAMED])}{more}")

    def dtype(self) -> torch.dtype:
        """The dtype of the embedding: what the checkpoint was saved in."""
        return STORED[self._file_of[EMBEDDING].get_slice(EMBEDDING).get_dtype()]

    def take(self, name: str) -> torch.Tensor:
        return self._file_of[name].get_tensor(name)


def load_model(path: str | Path, device: torch.device, dtype: str = "auto") -> Decoder:
    """Read the model directory `path` onto `device`. `dtype` is auto (as saved), fp32, bf16 or fp16."""
    path = Path(path)
    config = ModelConfig.from_dir(path)
    source = TensorSource(path)
    # Old checkpoints carry their rotary buffers; a tied model may carry its embedding twice.
    tied = (LM_HEAD,) if config.tie_word_embeddings else ()
    source.check(tensor_shapes(config), ignored=("rotary_emb.inv_freq", *tied))
    weight_dtype = source.dtype() if dtype == "auto" else DTYPES[dtype]
    activations = compute_dtype(weight_dtype, device)
    if packs_weights(weight_dtype, device):
        logger.info("this CPU has no fast %s products: weights are packed as fp16, arithmetic is fp32", weight_dtype)
    else:
        logger.info("weights and arithmetic are %s", weight_dtype)

    def weight(name: str) -> torch.Tensor:
        return source.take(name).to(device, weight_dtype)

    def norm(name: str) -> torch.Tensor:
        weight = source.take(f"{name}.weight").float() + config.norm_offset
        # 1 + weight is not representable in 16 bits, so Gemma's norms stay float32, as in transformers.
        return weight.to(device, torch.float32 if config.norm_offset else activations)

    def linear(names: list[str], bias: bool) -> Linear:
        biases = torch.cat([weight(f"{name}.bias") for name in names]) if bias else None
        return Linear(torch.cat([weight(f"{name}.weight") for name in names]), biases)

    # A copy: the file stays mapped otherwise, and whoever truncates it ends the process.
    embed = weight(EMBEDDING).clone()
    layers = []
    for idx in range(config.num_layers):
        base = f"model.layers.{idx}"
        attention, mlp = f"{base}.self_attn", f"{base}.mlp"
        post_norms, qk_norm = config.post_norms, config.qk_norm
        before_mlp = "pre_feedforward_layernorm" if post_norms else "post_attention_layernorm"
        layers.append(
            Layer(
                input_norm=norm(f"{base}.input_layernorm"),
                qkv=linear([f"{attention}.{name}_proj" for name in "qkv"], config.qkv_bias),
                q_norm=norm(f"{attention}.q_norm") if qk_norm else None,
                k_norm=norm(f"{attention}.k_norm") if qk_norm else None,
                o=linear([f"{attention}.o_proj"], config.o_bias),
                post_attention_norm=norm(f"{base}.post_attention_layernorm") if post_norms else None,
                mlp_norm=norm(f"{base}.{before_mlp}"),
                gate_up=linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"], config.mlp_bias),
                down=linear([f"{mlp}.down_proj"], config.mlp_bias),
                post_mlp_norm=norm(f"{base}.post_feedforward_layernorm") if post_norms else None,
            )
        )
    lm_head = Linear(embed if config.tie_word_embeddings else weight(LM_HEAD).clone())
    return Decoder(config, embed, layers, norm("model.norm"), lm_head, activations, weight_dtype)


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            files = [path / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index: {error}") from None
        missing = [file.name for file in files if not file.is_file() or file.parent != path]
        if missing:
            raise ModelError(f"{path} lacks {', '.join(missing[:MAX_NAMED])}, which its index names")
        return files
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    found = sorted(file.name for file in path.glob("*.bin"))
    hint = f"; {found[0]} is a pickle and is never loaded: save with safe_serialization=True" if found else ""
    raise ModelError(f"{path} has no model.safetensors{hint}")
