"""A loaded model as plain matrices on one device: what the torch and the Triton decoder multiply.

q, k, v are one linear, gate and up another. Inference only: plain tensors, no modules, no autograd. The native path
packs its own (`compute/native/`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels.linear import Linear
from ..kernels.lora_stack import LoraPair
from ..model.config import ModelConfig
from ..model.rope import Rope


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one layer; norms are [H] (or [D]), Gemma's in float32 with its offset already added."""

    input_norm: torch.Tensor
    qkv: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Linear
    post_attention_norm: torch.Tensor | None  # Gemma: on attention's output
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear
    post_mlp_norm: torch.Tensor | None  # Gemma: on the MLP's output


class DecoderWeights:
    """A loaded model as plain matrices, whatever multiplies them. `compute_dtype` is that of activations and KV."""

    num_builds = 0  # nothing is compiled while serving

    def __init__(
        self,
        config: ModelConfig,
        embed: torch.Tensor,
        layers: list[Layer],
        norm: torch.Tensor,
        lm_head: Linear,
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
        self._embed_scale = float(torch.tensor(config.embed_scale, dtype=weight_dtype))  # rounded as transformers does
        self._ropes = {kind: Rope(rope, self.device) for kind, rope in config.ropes.items()}

    @staticmethod
    def lay_out_lora(pair: LoraPair) -> LoraPair:
        """How a LoRA's weights are held for this decoder: as PEFT has them."""
        return pair
