"""Builds the torch path: a model's tensors as matrices that torch multiplies, and what runs steps of them."""

from __future__ import annotations

import logging
from contextlib import nullcontext

import torch

from ...drafters.head_source import HeadRunner
from ...kernels.linear import Linear, compute_dtype, packs_weights
from ...model.config import ModelConfig
from ..decoder_weights import Weights, fused_layers
from ..path import ComputePath, PathInputs, Phase
from ..runner import ModelRunner
from ..sampler import Sampler
from .decoder import Decoder

logger = logging.getLogger(__name__)

_UNSEEN_ON_CUDA = "what a phase takes on the device: it is queued there, and who waits first has the time of all"


def build(config: ModelConfig, weights: Weights) -> Decoder:
    activations = compute_dtype(weights.dtype, weights.device)
    if packs_weights(weights.dtype, weights.device):
        logger.info("this CPU has no fast %s products: weights are packed as fp16, arithmetic is fp32", weights.dtype)
    else:
        logger.info("weights and arithmetic are %s", weights.dtype)

    def norm(value: torch.Tensor) -> torch.Tensor:
        # 1 + weight is not representable in 16 bits, so Gemma's norms stay float32, as in transformers; nor is all that
        # Granite's final norm is divided by.
        return value if config.norm_offset or config.logits_divisor != 1 else value.to(activations)

    embed = weights.embed()
    lm_head = Linear(weights.lm_head(embed))
    norms, layers = norm(weights.final_norm()), fused_layers(config, weights, norm)
    return Decoder(config, embed, layers, norms, lm_head, activations, weights.dtype)


def make_path(decoder: Decoder, inputs: PathInputs) -> ComputePath:
    runner = ModelRunner(decoder, inputs.kv, decoder.slots(), inputs.base_head)
    sampler, heads = Sampler(inputs.eos_token_ids, inputs.masks), HeadRunner()
    is_cuda = decoder.device.type == "cuda"
    return ComputePath(
        runner=runner,
        sampler=sampler,
        heads=heads,
        stepped_heads=heads,
        torch_threads=nullcontext,
        is_asynchronous=is_cuda,
        phases=(
            Phase(runner, "forward", "build the batch"),
            Phase(decoder, "forward", "forward", is_model=True),
            Phase(decoder, "logits", "lm_head", is_model=True),
            Phase(sampler, "collect", "sample"),
            Phase(heads, "step", "lookahead heads"),
        ),
        unseen=_UNSEEN_ON_CUDA if is_cuda else "",
    )
