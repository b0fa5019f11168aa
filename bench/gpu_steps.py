"""How far is a decoding step on a GPU from reading the weights once, and what do LoRA and draft rows add to it?

A decoder of a published shape with random weights (a step's time does not depend on their values), run by the engine's
own runner and graphs: one sequence's step against weight bytes over the measured copy bandwidth; 8 rows of one sequence
(a verification) against 1; 32 sequences with 32 distinct rank-16 adapters on all linears against none; and of models
whose linears of few rows are fused with norms and activations, the same rows with these apart. The ways take turns.
--shape tiny with --device cpu (TRITON_INTERPRET=1) only shows that the bench runs, in bf16 with --exact on.

    python -m bench.gpu_steps [--shape llama8b|smollm2|tiny] [--quantization int8] [--rounds 20] [--exact off]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, get_args

import click
import torch

from specserve.adapters.lora import LoraAdapter
from specserve.compute.cuda.build import build
from specserve.compute.cuda.decoder import TritonDecoder
from specserve.compute.cuda.graph_cache import GraphCache
from specserve.compute.cuda.parts import DeviceParts
from specserve.compute.cuda.runner import DeviceRunner
from specserve.compute.kv_cache import KVCache
from specserve.compute.path import StepLimits
from specserve.config import Exact, Quantization
from specserve.kernels.scaled_weights import DTYPES, ScaledLinear
from specserve.schedule.block_manager import BlockManager

from . import common, options
from .gpu_timing import copy_bandwidth
from .random_models import RANK, RandomWeights, random_adapter, standing_sequences
from .shapes import LLAMA8B, SMOLLM2, TINY, ModelShape

SHAPES = {shape.name: shape for shape in (LLAMA8B, SMOLLM2, TINY)}
BLOCK_SIZE = 16
QUEUED = 8  # steps in a row: the host prepares one while the device runs the one before, as in the engine; on a CPU one
APART = {"1 row, apart": 1, "8 rows of one, apart": 8}
# None for LoRA's share: 32 adapters' bytes alone are 15%. One row in ms is judged where linears are fused, as SmolLM2.
WANTED = {"floor_ratio": 1.25, "verify_ratio": 1.1, "ms_of_one_row": 0.7}


class Steps:
    """Steps of one shape over sequences that stay where they are, so that each repeat does the same work."""

    def __init__(
        self, shape: ModelShape, device: torch.device, dtype: torch.dtype, num_seqs: int, context: int, exact: Exact,
        quantization: Quantization, is_fused: bool = True,
    ):  # fmt: skip
        config = shape.config()
        weights = RandomWeights(config, device, dtype)
        self.decoder = build(config, weights, exact, quantization)
        if not is_fused:
            self.decoder.fused = frozenset()
        self.device = device
        self.queued = QUEUED if device.type == "cuda" else 1
        num_blocks = num_seqs * (-(-(context + 64) // BLOCK_SIZE))
        self._blocks = BlockManager(num_blocks, BLOCK_SIZE, prefix_caching=False)
        kv = KVCache(config.num_layers, num_blocks, BLOCK_SIZE, config.num_kv_heads, config.head_dim, dtype, device)
        for k, v in zip(kv.k, kv.v, strict=True):  # what was never written may hold NaN
            k.normal_(), v.normal_()
        limits = StepLimits(
            max_rows=512, max_seqs=num_seqs, max_model_len=context + 64,
            max_adapters=max(1, num_seqs), max_lora_rank=RANK, max_draft_tokens=1,
        )  # fmt: skip
        self.runner = DeviceRunner(DeviceParts.of(self.decoder, kv, limits, GraphCache(self.decoder.device, True)))
        self._context = context
        self.weight_bytes = _weight_bytes(self.decoder)

    def way(self, num_seqs: int, num_rows: int, adapters: list[LoraAdapter]) -> Callable[[], None]:
        """A step of `num_seqs` sequences with `num_rows` rows each, adapter i for sequence i."""
        items = standing_sequences(self._blocks, num_seqs, num_rows, self._context, adapters)
        held = {adapter.content_hash: adapter for adapter in adapters}

        def run() -> None:
            for _ in range(self.queued):
                self.runner.forward(items, held)

        return run


def _weight_bytes(decoder: TritonDecoder) -> int:
    linears = [linear for layer in decoder.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    held = [x.weights if isinstance(x, ScaledLinear) else x.unpacked() for x in (*linears, decoder.lm_head)]
    return sum(weights.nbytes for weights in held)


def timed(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, until the device is done."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@click.command(help=__doc__.partition("\n")[0])
@click.option("--shape", type=click.Choice(list(SHAPES)), default="llama8b", show_default=True)
@options.rounds(20)
@options.at_least(1, "--context", 512)
@click.option("--seqs", "num_seqs", type=click.IntRange(1), default=32, show_default=True)
@click.option("--exact", type=click.Choice(get_args(Exact)), default="auto", show_default=True)
@click.option("--quantization", type=click.Choice(["none", *DTYPES]), default="none", show_default=True)
@click.option("--device", default="cuda", show_default=True)
@options.save("gpu_steps", default=False)
@torch.inference_mode()
def main(
    shape: str, rounds: int, context: int, num_seqs: int, exact: Exact, quantization: Quantization, device: str,
    save: bool,
) -> None:  # fmt: skip
    run = common.start("gpu_steps", "torch", "triton", device=device)
    place = torch.device(device)
    is_fp32 = place.type == "cpu" and quantization == "none" and exact != "on"
    dtype = torch.float32 if is_fp32 else torch.bfloat16
    bandwidth = copy_bandwidth(place, 1 << (31 if place.type == "cuda" else 26))
    steps = Steps(SHAPES[shape], place, dtype, num_seqs, context, exact, quantization)
    click.echo(f"a row's bits are the same in every step: {steps.decoder.is_exact} (--exact {exact})")
    floor_ms = 1e3 * steps.weight_bytes / bandwidth
    click.echo(
        f"floor: {steps.weight_bytes / 1e9:.2f} GB of weights at {bandwidth / 1e9:.0f} GB/s take {floor_ms:.3f} ms"
    )
    adapters = [random_adapter(steps.decoder.config, idx, place, dtype) for idx in range(num_seqs)]
    ways = {
        "1 row": steps.way(1, 1, []),
        "8 rows of one": steps.way(1, 8, []),
        f"{num_seqs} rows": steps.way(num_seqs, 1, []),
        f"{num_seqs} rows, {num_seqs} adapters": steps.way(num_seqs, 1, adapters),
    }
    if steps.decoder.fused:
        apart = Steps(SHAPES[shape], place, dtype, num_seqs, context, exact, quantization, is_fused=False)
        ways |= {name: apart.way(1, num_rows, []) for name, num_rows in APART.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(1e3 * timed(way, place) / steps.queued)
    ms = {name: common.spread(values) for name, values in times.items()}
    one, eight, many, mixed = (ms[name]["median"] for name in list(ways)[:4])
    figures = {
        "floor_ratio": round(one / floor_ms, 3),
        "verify_ratio": round(eight / one, 3),
        "lora_share": round((mixed - many) / mixed, 3),
    }
    if steps.decoder.fused:
        ratios = (one / ms["1 row, apart"]["median"], eight / ms["8 rows of one, apart"]["median"])
        figures |= dict(zip(("fused_ratio", "fused_verify_ratio"), (round(ratio, 3) for ratio in ratios), strict=True))
        figures["ms_of_one_row"] = round(one, 4)
    for name, spread in ms.items():
        click.echo(f"{name}: {spread['median']:.3f} ms ({spread['min']:.3f} to {spread['max']:.3f})")
    for name, value in figures.items():
        click.echo(f"{name}: {value}" + (f" (wanted at most {WANTED[name]})" if name in WANTED else ""))
    graphs = steps.runner.graphs
    fields = {
        "shape": shape,
        "quantization": quantization,
        "is_exact": steps.decoder.is_exact,
        "fused": sorted(steps.decoder.fused),
        "context": context,
        "rounds": rounds,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "floor_ms": round(floor_ms, 4),
        "ms": ms,
        "figures": figures,
        "graphs": {"num": graphs.num_graphs, "capture_s": round(graphs.capture_s, 2), "bytes": graphs.capture_bytes},
    }
    run.finish(fields, save)


if __name__ == "__main__":
    main()
