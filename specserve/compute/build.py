"""Puts a model's tensors into the form that each path multiplies: torch, Triton on CUDA, native on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch

from ..kernels.linear import Linear, compute_dtype, packs_weights
from ..kernels.packed import pack
from ..model.config import ModelConfig
from .cuda.decoder import TritonDecoder
from .decoder_weights import Layer
from .native.choice import NativeChoice
from .native.decoder import NativeDecoder, pack_layer, weight_format
from .torch.decoder import Decoder

logger = logging.getLogger(__name__)


class Weights(Protocol):
    """Where a decoder's tensors come from, by module names on the hub, on `device` in `dtype`; norms are fp32."""

    device: torch.device
    dtype: torch.dtype

    def norm(self, name: str) -> torch.Tensor: ...
    def linear(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]: ...
    def layer_norms(self, idx: int) -> dict[str, torch.Tensor]: ...
    def embed(self) -> torch.Tensor: ...
    def lm_head(self, embed: torch.Tensor) -> torch.Tensor: ...


def build_torch(config: ModelConfig, weights: Weights) -> Decoder:
    activations = compute_dtype(weights.dtype, weights.device)
    if packs_weights(weights.dtype, weights.device):
        logger.info("this CPU has no fast %s products: weights are packed as fp16, arithmetic is fp32", weights.dtype)
    else:
        logger.info("weights and arithmetic are %s", weights.dtype)

    def norm(value: torch.Tensor) -> torch.Tensor:
        # 1 + weight is not representable in 16 bits, so Gemma's norms stay float32, as in transformers.
        return value if config.norm_offset else value.to(activations)

    embed = weights.embed()
    lm_head = Linear(weights.lm_head(embed))
    norms, layers = norm(weights.norm("model.norm")), _layers(config, weights, norm)
    return Decoder(config, embed, layers, norms, lm_head, activations, weights.dtype)


def build_triton(config: ModelConfig, weights: Weights) -> TritonDecoder:
    """The decoder of the Triton kernels; norms stay fp32."""
    activations = compute_dtype(weights.dtype, weights.device)
    embed = weights.embed()
    lm_head = Linear(weights.lm_head(embed))
    layers = _layers(config, weights, lambda value: value)
    logger.info("Triton kernels on %s: weights and arithmetic are %s", weights.device, weights.dtype)
    return TritonDecoder(config, embed, layers, weights.norm("model.norm"), lm_head, activations, weights.dtype)


def _layers(config: ModelConfig, weights: Weights, norm: Callable[[torch.Tensor], torch.Tensor]) -> list[Layer]:
    """q, k, v as one linear, gate and up as another; `norm` gives norms their dtype."""

    def linear(*names: str) -> Linear:
        pairs = [weights.linear(name) for name in names]
        biases = [bias for _, bias in pairs if bias is not None]
        return Linear(torch.cat([weight for weight, _ in pairs]), torch.cat(biases) if biases else None)

    layers = []
    for idx in range(config.num_layers):
        attention, mlp = f"model.layers.{idx}.self_attn", f"model.layers.{idx}.mlp"
        norms = {name: norm(value) for name, value in weights.layer_norms(idx).items()}
        layers.append(
            Layer(
                input_norm=norms["input_norm"],
                qkv=linear(*(f"{attention}.{name}_proj" for name in "qkv")),
                q_norm=norms.get("q_norm"),
                k_norm=norms.get("k_norm"),
                o=linear(f"{attention}.o_proj"),
                post_attention_norm=norms.get("post_attention_norm"),
                mlp_norm=norms["mlp_norm"],
                gate_up=linear(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                down=linear(f"{mlp}.down_proj"),
                post_mlp_norm=norms.get("post_mlp_norm"),
            )
        )
    return layers


def build_native(config: ModelConfig, weights: Weights, native: NativeChoice) -> NativeDecoder:
    form = weight_format(weights.dtype, native.quantization)
    embed = weights.embed()
    layers = [
        pack_layer(weights.linear, weights.layer_norms(idx), f"model.layers.{idx}", form)
        for idx in range(config.num_layers)
    ]
    lm_head = pack(weights.lm_head(embed), None, form)
    norm = weights.norm("model.norm")
    decoder = NativeDecoder(native.library, native.num_threads, config, embed, layers, norm, lm_head, weights.dtype)
    logger.info(
        "native CPU path: weights are %s, activations %s, %d threads", form, decoder.compute_dtype, native.num_threads
    )
    return decoder
