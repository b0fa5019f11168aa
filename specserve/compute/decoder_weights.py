"""A loaded model as plain matrices on one device: what the torch and the Triton decoder multiply.

q, k, v are one linear, gate and up another. Inference only: plain tensors, no modules, no autograd. `Weights` is where
the tensors of any path come from; the native path packs its own (`compute/native/`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from ..adapters.slab import as_in_peft
from ..kernels.linear import Linear
from ..kernels.lora import Empty, LoraPair
from ..kernels.scaled_weights import ScaledLinear
from ..model.config import ModelConfig
from ..model.rope import Rope
from ..model.shapes import PARENT

# The fused linears of a layer, and their modules in the order of their columns.
GROUPS: dict[str, tuple[str, ...]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


AnyLinear: TypeAlias = Linear | ScaledLinear


class Weights(Protocol):
    """Where a decoder's tensors come from, by module names on the hub, on `device` in `dtype`; norms are fp32."""

    device: torch.device
    dtype: torch.dtype

    def final_norm(self) -> torch.Tensor: ...
    def linear(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]: ...
    def layer_norms(self, idx: int) -> dict[str, torch.Tensor]: ...
    def embed(self) -> torch.Tensor: ...
    def lm_head(self, embed: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer; norms are [H], Gemma's in float32 with its offset already added."""

    input_norm: torch.Tensor | None  # OLMo has none
    qkv: AnyLinear
    q_norm: torch.Tensor | None  # [D], or [Hq * D] where all heads are normed as one
    k_norm: torch.Tensor | None
    o: AnyLinear
    post_attention_norm: torch.Tensor | None  # Gemma, OLMo: on attention's output
    mlp_norm: torch.Tensor | None
    gate_up: AnyLinear
    down: AnyLinear
    post_mlp_norm: torch.Tensor | None  # the same of the MLP's output


class DecoderWeights:
    """A loaded model as plain matrices, whatever multiplies them. `compute_dtype` is that of activations and KV."""

    kernels = "torch"  # what multiplies them
    num_builds = 0  # nothing is compiled while serving
    is_exact = False  # whether a row's bits are the same in every step

    def __init__(
        self,
        config: ModelConfig,
        embed: torch.Tensor,
        layers: list[Layer],
        norm: torch.Tensor,
        lm_head: AnyLinear,
        compute_dtype: torch.dtype,
        weight_dtype: torch.dtype,
    ):
        self.config = config
        self.embed = embed  # [V, H] in the weights' dtype
        self.layers = layers
        self.norm = norm
        self.lm_head = lm_head
        self.compute_dtype = compute_dtype
        self.weight_dtype_name = str(weight_dtype).removeprefix("torch.")
        self.device = embed.device
        self._embed_scale = config.embed_scale_of(weight_dtype)
        self._ropes = {kind: Rope(rope, self.device) for kind, rope in config.ropes.items()}

    @staticmethod
    def lay_out_lora(pair: LoraPair, empty: Empty = torch.empty) -> LoraPair:
        """A copy of a LoRA's weights as they are held for this decoder, which is as PEFT has them."""
        return as_in_peft(pair, empty)


def fused_layers(
    config: ModelConfig,
    weights: Weights,
    norm: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    make_linear: Callable[[torch.Tensor, torch.Tensor | None], AnyLinear] = Linear,
) -> list[Layer]:
    """The modules of each of GROUPS as one linear, made of weight and bias; `norm` gives norms their dtype."""

    def linear(idx: int, group: str) -> AnyLinear:
        names = (f"model.layers.{idx}.{PARENT[module]}.{module}" for module in GROUPS[group])
        pairs = [weights.linear(name) for name in names]
        biases = [bias for _, bias in pairs if bias is not None]
        return make_linear(torch.cat([weight for weight, _ in pairs]), torch.cat(biases) if biases else None)

    layers = []
    for idx in range(config.num_layers):
        norms = {name: norm(value) for name, value in weights.layer_norms(idx).items()}
        layers.append(
            Layer(
                input_norm=norms.get("input_norm"),
                qkv=linear(idx, "qkv"),
                q_norm=norms.get("q_norm"),
                k_norm=norms.get("k_norm"),
                o=linear(idx, "o"),
                post_attention_norm=norms.get("post_attention_norm"),
                mlp_norm=norms.get("mlp_norm"),
                gate_up=linear(idx, "gate_up"),
                down=linear(idx, "down"),
                post_mlp_norm=norms.get("post_mlp_norm"),
            )
        )
    return layers
