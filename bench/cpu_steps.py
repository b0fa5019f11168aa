"""How much of what this CPU can read and multiply does a step use, at sizes that people run?

A decoder of a published shape with random weights, run by the engine's own runner: decoding steps of one row a
sequence, a verification (64 rows of 8 sequences), a prompt of 512 rows, at several contexts. First the limits: bytes a
second that all threads read, and multiplications, in registers and oneDNN's. A step's limit is the larger of the time
for its bytes (weights at 16, 8 or 5 bits, without scales, and KV) and the time for its operations. Limits and cases
take turns, so that a slow minute hits all alike. --kernels and --quantization may be given several times. --adapters
adds steps whose sequences have a rank-16 LoRA each, --neighbours each case once more beside as many busy processes.
With --threads 1, --cpu-time counts the thread's own time: on a machine that does other work, ratios of that still hold.

    python -m bench.cpu_steps [--shape smollm2|1b|3b] [--quantization int8] [--kernels auto] [--rounds 5]
"""

from __future__ import annotations

import itertools
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, get_args, get_type_hints

import click
import torch

from specserve.adapters.lora import LoraAdapter
from specserve.compute.kv_cache import KVCache
from specserve.compute.loader import AnyDecoder, build_decoder, choose_paths
from specserve.compute.native.decoder import NativeDecoder, one_torch_thread
from specserve.compute.runner import ModelRunner
from specserve.config import EngineConfig
from specserve.model.config import ModelConfig
from specserve.schedule.block_manager import BlockManager

from . import common, options
from .cpu_cases import BITS, BLOCK_SIZE, SHAPES, Case, cases_of
from .cpu_limits import ONEDNN, CpuLimits
from .random_models import RandomWeights, random_adapter, standing_sequences

DEVICE = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ENOUGH_S, MOST_REPEATS = 0.2, 21
SPIN_S = 0.3  # torch's threads spin for a while after the limits
MOST_READ = 2 << 30  # bytes read for the bandwidth: more than any cache holds, and no second model in memory


@dataclass(slots=True)
class Figures:
    """One case with one decoder: seconds of each round, alone and beside neighbours; seconds by phase, summed."""

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)


class Steps:
    """One decoder and its cases; all of them lie in the same blocks."""

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        settings: EngineConfig,
        dtype: torch.dtype,
        cases: list[Case],
        adapters: int,
        most_repeats: int,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._most_repeats, self._clock = most_repeats, clock
        self.name = name
        self.bits = BITS[settings.quantization] if settings.quantization != "none" else 8 * dtype.itemsize
        self.decoder: AnyDecoder = build_decoder(
            config, RandomWeights(config, DEVICE, dtype), choose_paths(settings, DEVICE)
        )
        self.what = f"{type(self.decoder).__name__}, activations {self.decoder.compute_dtype}"
        self.kv_bytes = self.decoder.compute_dtype.itemsize
        most = max(case.num_blocks for case in cases)
        blocks = BlockManager(most, BLOCK_SIZE, prefix_caching=False)
        kv = KVCache(
            config.num_layers,
            most,
            BLOCK_SIZE,
            config.num_kv_heads,
            config.head_dim,
            self.decoder.compute_dtype,
            DEVICE,
        )
        for part in (*kv.k, *kv.v):  # what was never written may hold NaN, and is not there yet
            part.uniform_(-1, 1)
        runner = ModelRunner(self.decoder, kv, self.decoder.slots())
        loras = [
            random_adapter(config, idx, DEVICE, self.decoder.compute_dtype, self.decoder.lay_out_lora)
            for idx in range(adapters)
        ]
        self._held = {lora.content_hash: lora for lora in loras}
        self._ways = {case.name: self._way(runner, blocks, case, loras) for case in cases}
        self._threads = one_torch_thread if isinstance(self.decoder, NativeDecoder) else nullcontext

    def _way(
        self, runner: ModelRunner, blocks: BlockManager, case: Case, loras: list[LoraAdapter]
    ) -> Callable[[], Any]:
        chosen = [loras[idx % case.num_loras] for idx in range(case.num_seqs)] if case.num_loras else []
        items = standing_sequences(blocks, case.num_seqs, case.num_rows, case.context, chosen, case.is_prompt)
        return lambda: runner.forward(items, self._held)

    def seconds(self, case: Case) -> tuple[float, dict[str, float]]:
        """Of one step, and by the phases of its kernels; short ones are repeated, and the median is given."""
        with self._threads():
            taken = [self._once(case)]
            if taken[0][0] < ENOUGH_S:
                taken = [self._once(case) for _ in range(min(self._most_repeats, int(ENOUGH_S / taken[0][0])))]
        taken.sort(key=lambda step: step[0])
        return taken[len(taken) // 2]

    def _once(self, case: Case) -> tuple[float, dict[str, float]]:
        clocks = self.decoder.clocks if isinstance(self.decoder, NativeDecoder) else dict
        before, start = clocks(), self._clock()
        self._ways[case.name]()
        taken = self._clock() - start
        return taken, {name: value - before[name] for name, value in clocks().items()}


@contextmanager
def busy_processes(num: int) -> Iterator[Callable[[bool], None]]:
    """`num` busy processes, which the function that it gives lets run or stops."""
    with ExitStack() as stack:
        processes = []
        for _ in range(num):
            process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)

        def let(run: bool) -> None:
            for process in processes:
                process.send_signal(signal.SIGCONT if run else signal.SIGSTOP)

        let(False)
        yield let


def measured(
    decoders: list[Steps], cases: list[Case], limits: CpuLimits, rounds: int, let: Callable[[bool], None] | None
) -> dict[str, dict[str, Figures]]:
    """Figures by kernels and case. A first round, which is not counted, warms up."""
    figures = {steps.name: {case.name: Figures() for case in cases} for steps in decoders}
    for round_idx in range(rounds + 1):
        limits.measure()
        time.sleep(SPIN_S)
        for case in cases:
            for steps in decoders if round_idx % 2 else decoders[::-1]:
                taken, phases = steps.seconds(case)
                found = figures[steps.name][case.name]
                if round_idx:
                    found.alone.append(taken)
                    found.phases = {name: found.phases.get(name, 0.0) + value for name, value in phases.items()}
                if let is not None:
                    let(True)
                    found.beside += [steps.seconds(case)[0]] if round_idx else []
                    let(False)
    return figures


def shown(
    figures: Figures, case: Case, config: ModelConfig, bits: int, kv_bytes: int, bytes_per_s: float, peak: float
) -> dict[str, Any]:
    """Print a case and give what the record has of it."""
    num_bytes, operations = case.num_bytes(config, bits, kv_bytes), case.num_operations(config)
    by_bytes, by_operations = num_bytes / bytes_per_s, operations / peak
    limit = max(by_bytes, by_operations)
    ms = common.spread([1e3 * taken for taken in figures.alone])
    record: dict[str, Any] = {
        "ms": ms,
        "limit_ms": round(1e3 * limit, 3),
        "limit": "bytes" if by_bytes >= by_operations else "operations",
        "share": round(1e3 * limit / ms["median"], 3),
        "gb_per_s": round(num_bytes / ms["median"] / 1e6, 2),
        "gflops": round(operations / ms["median"] / 1e6, 1),
        "phases": {name: round(value / sum(figures.alone), 3) for name, value in figures.phases.items()},
    }
    text = (
        f"  {case.name:<28} {ms['median']:>10.2f} ms ({ms['min']:.2f} to {ms['max']:.2f}), limit {1e3 * limit:>9.2f} "
        f"by {record['limit']:<10} share {record['share']:>5.0%}, {record['gb_per_s']:>6.1f} GB/s, "
        f"{record['gflops']:>7.1f} GFLOP/s"
    )
    if figures.beside:
        record["ms_beside_neighbours"] = common.spread([1e3 * taken for taken in figures.beside])
        ratio = statistics.median(b / a for a, b in zip(figures.alone, figures.beside, strict=True))
        record["beside_over_alone"] = round(ratio, 3)
        text += f", beside neighbours {ratio:.2f}x"
    click.echo(text)
    return record


def ratios(decoders: list[Steps], figures: dict[str, dict[str, Figures]]) -> dict[str, dict[str, dict[str, float]]]:
    """How many times as fast as the first decoder each other one was, round by round; printed."""
    first, *others = decoders
    found: dict[str, dict[str, dict[str, float]]] = {}
    for steps in others:
        found[steps.name] = {
            name: common.spread([a / b for a, b in zip(base.alone, figures[steps.name][name].alone, strict=True)])
            for name, base in figures[first.name].items()
        }
        shown_ones = ", ".join(f"{name} {ratio['median']:.2f}x" for name, ratio in found[steps.name].items())
        click.echo(f"{steps.name} over {first.name}: {shown_ones}")
    return found


@click.command(help=__doc__.partition("\n")[0])
@click.option("--shape", type=click.Choice(list(SHAPES)), default="smollm2", show_default=True)
@click.option(
    "--kernels", multiple=True, default=["auto"], show_default=True,
    type=click.Choice(get_args(get_type_hints(EngineConfig)["kernels"])),
)  # fmt: skip
@click.option("--quantization", multiple=True, type=click.Choice(list(BITS)), default=["none"], show_default=True)
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]), default="bf16", show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Default: all cores.")
@options.numbers("--rows", "1,8,16,64", "Sequences of a decoding step.")
@options.numbers("--contexts", "0,2048,8192", "Tokens before a step.", least=0)
@options.at_least(1, "--prompt", 512, "Rows of a prompt.")
@click.option("--kv-gib", default=5.0, show_default=True, help="Cases whose KV needs more are left out.")
@options.at_least(0, "--adapters", 0, "Different LoRAs in steps of their own.")
@options.at_least(0, "--neighbours", 0, "Busy processes.")
@click.option("--cpu-time", is_flag=True, help="The thread's own time instead of the clock's; needs --threads 1.")
@options.rounds(5)
@click.option("--dry-run", is_flag=True, help="A tiny shape, once: only shows that the bench runs.")
@options.save("cpu_steps", default=False)
@torch.inference_mode()
def main(
    shape: str, kernels: tuple[str, ...], quantization: tuple[str, ...], dtype: str, threads: int | None,
    rows: list[int], contexts: list[int], prompt: int, kv_gib: float, adapters: int, neighbours: int, rounds: int,
    cpu_time: bool, dry_run: bool, save: bool,
) -> None:  # fmt: skip
    if cpu_time and threads != 1:
        raise click.UsageError("--cpu-time is the time of one thread; add --threads 1")
    run = common.start("cpu_steps", "torch")
    if dry_run:
        shape, rows, contexts, prompt, rounds = "tiny", [1], [40], 30, 1
    num_threads = threads or common.num_cores()
    torch.set_num_threads(num_threads)
    config = SHAPES[shape].config()
    bits = BITS[quantization[0]] if quantization[0] != "none" else 8 * DTYPES[dtype].itemsize
    num_bytes = Case(1, 1, 0).num_bytes(config, bits, 0)
    limits = CpuLimits(num_threads, min(int(num_bytes), MOST_READ))
    limits.measure(repeats=1 if dry_run else 10)
    kind, peak = limits.peak("none" not in quantization)
    click.echo(
        f"limits, {num_threads} threads: {limits.bytes_per_s / 1e9:.1f} GB/s, so that {num_bytes / 1e9:.2f} GB of "
        f"weights take {1e3 * num_bytes / limits.bytes_per_s:.2f} ms; {peak / 1e9:.0f} GFLOP/s ({kind}), "
        f"of which oneDNN's own product of matrices makes {limits.operations_per_s[ONEDNN] / 1e9:.0f}"
    )
    kv_position = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
    cases, left_out = [], []
    for case in cases_of(rows, contexts, prompt, adapters):
        fits = case.num_blocks * BLOCK_SIZE * kv_position <= kv_gib * 2**30
        (cases if fits else left_out).append(case)
    if left_out:
        click.echo(f"left out, their KV is above --kv-gib {kv_gib}: {', '.join(case.name for case in left_out)}")
    decoders = []
    clock = time.thread_time if cpu_time else time.perf_counter
    for level, form in itertools.product(kernels, quantization):
        settings = EngineConfig(kernels=level, quantization=form, num_threads=threads)  # type: ignore[arg-type]
        name = level if quantization == ("none",) else f"{level} {form}"
        decoders.append(
            Steps(name, config, settings, DTYPES[dtype], cases, adapters, 1 if dry_run else MOST_REPEATS, clock)
        )
    with busy_processes(neighbours) as let:
        figures = measured(decoders, cases, limits, rounds, let if neighbours else None)
    results = {}
    for steps in decoders:
        click.echo(f"{steps.name}: {steps.what}")
        _, peak = limits.peak(steps.bits < 16)
        results[steps.name] = {
            case.name: shown(
                figures[steps.name][case.name], case, config, steps.bits, steps.kv_bytes, limits.bytes_per_s, peak
            )
            for case in cases
        }
    over = ratios(decoders, figures)
    fields = {
        "shape": shape,
        "dtype": dtype,
        "quantization": list(quantization),
        "threads": num_threads,
        "rounds": rounds,
        "neighbours": neighbours,
        "cpu_time": cpu_time,
        "dry_run": dry_run,
        "limit": {
            "gb_per_s": round(limits.bytes_per_s / 1e9, 2),
            "gflops": {name: round(rate / 1e9, 1) for name, rate in limits.operations_per_s.items()},
            "peak": kind,
        },
        "left_out": [case.name for case in left_out],
        "results": results,
        "over_first": over,
    }
    run.finish(fields, save)


if __name__ == "__main__":
    main()
