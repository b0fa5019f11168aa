"""Builds the native path: a model's tensors packed for the kernels of the CPU, and what runs steps of them."""

from __future__ import annotations

import logging

import torch

from ...drafters.head_native import NativeHeadRunner
from ...kernels.huge_pages import HugePages
from ...kernels.native import Library
from ...kernels.packed import WeightFormat, pack
from ...memory import give_memory_back
from ...model.config import ModelConfig
from ...model.shapes import LINEARS, PARENT
from ..decoder_weights import Weights
from ..path import ComputePath, PathInputs, Phase
from ..runner import ModelRunner
from .decoder import NativeDecoder, NativeLayer, one_torch_thread
from .sampler import NativeSampler

logger = logging.getLogger(__name__)


def build(
    config: ModelConfig, weights: Weights, library: Library, num_threads: int, quantization: str
) -> NativeDecoder:
    form = _weight_format(weights.dtype, quantization)
    embed = weights.embed()
    memory = HugePages()
    # 4 bits of the lm_head cost a fifth of what 4 bits cost at all, for a seventh of the bytes of a model of 135M.
    head_form: WeightFormat = "int8" if form == "int4" else form
    # The largest comes before there is anything else in memory.
    lm_head = pack(weights.lm_head(embed), None, head_form, memory)
    layers = [_pack_layer(weights, idx, form, memory) for idx in range(config.num_layers)]
    norm = weights.final_norm()
    decoder = NativeDecoder(library, num_threads, config, embed, layers, norm, lm_head, weights.dtype)
    inputs = str(decoder.compute_dtype).removeprefix("torch.")
    if quantization != "none":
        inputs = f"int8, multiplied by {library.int8_products}"
    logger.info("native CPU path: weights are %s, activations %s, %d threads", form, inputs, num_threads)
    return decoder


def make_path(decoder: NativeDecoder, inputs: PathInputs) -> ComputePath:
    runner = ModelRunner(decoder, inputs.kv, decoder.slots(), inputs.base_head)
    sampler = NativeSampler(inputs.eos_token_ids, inputs.masks, decoder.team, decoder.best)
    heads = NativeHeadRunner(decoder.team)
    return ComputePath(
        runner=runner,
        sampler=sampler,
        heads=heads,
        stepped_heads=heads,
        torch_threads=one_torch_thread,
        is_asynchronous=False,
        phases=(
            Phase(runner, "forward", "build the batch"),
            # What the kernels' own clocks leave of the forward is this.
            Phase(decoder, "step", "call the kernels", is_model=True, clocks=decoder.clocks),
            Phase(sampler, "collect", "sample"),
            Phase(heads, "step", "lookahead heads"),
        ),
        costs_key=decoder.costs_key,
        interrupt=decoder.interrupt,
    )


def _weight_format(dtype: torch.dtype, quantization: str) -> WeightFormat:
    """How weights of `dtype` are packed. int8 and int4 hold for the linears and the lm_head."""
    if quantization != "none":
        return quantization  # type: ignore[return-value]
    return "bf16" if dtype == torch.bfloat16 else "f32"


def _pack_layer(weights: Weights, idx: int, form: WeightFormat, memory: HugePages) -> NativeLayer:
    base, modules = f"model.layers.{idx}", {}
    for module in LINEARS:
        weight, bias = weights.linear(f"{base}.{PARENT[module]}.{module}")
        modules[module] = pack(weight, bias, form, memory)
    give_memory_back()  # what quantizing took lies between the layers otherwise: 0.8 GB after 1.2 GB of int8
    return NativeLayer(modules, weights.layer_norms(idx))
