"""Builds the CUDA path: a model's tensors as matrices for cuBLAS and Triton, and what runs steps of them.

Weights that are held in 8 bits are made so matrix by matrix, as they are read: the peak is the model in 8 bits and one
fused matrix in 16.

Graphs that serve any step are captured here, at start: first those of the forward, then those of the heads, none of
which has met a sequence.
"""

from __future__ import annotations

import functools
import logging
import os
from contextlib import nullcontext

import torch

from ...config import Exact, Quantization
from ...errors import ModelError
from ...kernels.linear import Linear, compute_dtype
from ...kernels.scaled_weights import ScaledLinear
from ...model.config import ModelConfig
from ..decoder_weights import Weights, fused_layers
from ..path import ComputePath, PathInputs, Phase
from .decoder import TritonDecoder
from .drafts import DeviceDrafts
from .fused_linears import fused_groups
from .graph_cache import GraphCache
from .one_order import cannot_scale, keep_one_order, keep_scaled_order
from .parts import DeviceParts
from .runner import DeviceRunner
from .sampler import DeviceSampler
from .step_memory import step_bytes

logger = logging.getLogger(__name__)

_UNSEEN = "what layers, lm_head, sampling and heads take on the device: all are queued there and waited for once"


def build(config: ModelConfig, weights: Weights, exact: Exact, quantization: Quantization = "none") -> TritonDecoder:
    """The decoder of the Triton kernels; norms stay fp32.

    Raises `ModelError` where `exact` is on and cannot be, or the device cannot multiply what is quantized.
    """
    # As the kernels were read and checked; those that must round as they are written say so (written_rounding.py).
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where nobody says it, 3.10 changes it
    if quantization != "none":
        return _build_scaled(config, weights, exact, quantization)
    activations = compute_dtype(weights.dtype, weights.device)
    embed = weights.embed()
    lm_head = Linear(weights.lm_head(embed))
    layers = fused_layers(config, weights)
    logger.info("Triton kernels on %s: weights and arithmetic are %s", weights.device, weights.dtype)
    decoder = TritonDecoder(config, embed, layers, weights.final_norm(), lm_head, activations, weights.dtype)
    decoder.is_exact = keep_one_order(exact, config, layers, lm_head)
    if decoder.is_exact:
        decoder.fused = fused_groups(config, layers, activations, weights.device)
    return decoder


def _build_scaled(config: ModelConfig, weights: Weights, exact: Exact, quantization: Quantization) -> TritonDecoder:
    """The same with linears and lm_head in 8 bits; activations, embedding and KV have the weights' dtype."""
    if (reason := cannot_scale(weights.device)) is not None:
        raise ModelError(f"quantization={quantization} needs an H100 or newer on CUDA: {reason}; set it to none")
    make_linear = functools.partial(ScaledLinear, form=quantization)
    embed = weights.embed()
    lm_head = make_linear(weights.lm_head(embed), None)  # first: nothing larger lies beside the 8 bits in 16
    layers = fused_layers(config, weights, make_linear=make_linear)
    logger.info("Triton kernels on %s: weights are %s, activations %s", weights.device, quantization, weights.dtype)
    norm = weights.final_norm()
    decoder = TritonDecoder(config, embed, layers, norm, lm_head, weights.dtype, weights.dtype)
    decoder.weight_dtype_name = quantization
    if weights.device.type == "cuda":
        torch.cuda.empty_cache()  # what the 16 bits lay in: the KV cache takes a share of what is free
    decoder.is_exact = keep_scaled_order(exact, config, layers, lm_head, weights.dtype)
    if decoder.is_exact:
        decoder.fused = fused_groups(config, layers, weights.dtype, weights.device)
    return decoder


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def make_path(decoder: TritonDecoder, inputs: PathInputs) -> ComputePath:
    limits, free = inputs.limits, _free_bytes(decoder.device)
    parts = DeviceParts.of(decoder, inputs.kv, limits, GraphCache(decoder.device, inputs.cuda_graphs))
    drafts = DeviceDrafts(parts, parts.sampled.tokens, inputs.adapters, limits, inputs.base_head)
    runner = DeviceRunner(parts, on_seated=drafts.prepare)
    sampler = DeviceSampler(inputs.eos_token_ids, inputs.masks, parts, drafts)
    runner.capture()
    drafts.capture()
    logger.info(
        "steps hold %.0f MiB of the device, %.0f were left for them",
        (free - _free_bytes(decoder.device)) / 2**20,
        step_bytes(decoder.config, decoder.compute_dtype, limits, inputs.cuda_graphs) / 2**20,
    )
    return ComputePath(
        runner=runner,
        sampler=sampler,
        heads=drafts,
        stepped_heads=None,
        torch_threads=nullcontext,
        is_asynchronous=decoder.device.type == "cuda",
        max_rows_ahead=parts.sampled.num_rows,
        beside_step=parts.layers.capture_missed,
        phases=(
            Phase(runner, "forward", "queue the forward"),
            Phase(sampler, "launch", "queue sampling"),
            Phase(drafts, "launch", "queue lookahead heads"),
            Phase(parts.sampled, "read", "wait for the device"),
        ),
        unseen=_UNSEEN,
        graphs=parts.graphs,
    )
