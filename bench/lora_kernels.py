"""What does LoRA add to a step, and how far is that from reading the adapters' weights once?

On a GPU (bench/lora_gpu.py): one fused linear at a time, in CUDA graphs, over mixes of adapters, ranks and rows, with
the targets beside; another implementation's kernels can be timed in the same cases. Cases are left out once --budget
seconds are over, and said to be.

On the CPU: every LoRA product of one forward pass (q/k/v, o, gate/up, down in every layer) for a mixed batch, against
the two obvious ways to write it: a loop over adapters with addmm_, and one torch.bmm per module over stacked weights
(which needs equal ranks and equal rows, as in the batches timed here). The ways alternate within each round, so that
their ratio survives a machine that slows down; where others keep its cores busy, --cpu-time compares the CPU time of
one thread instead. The floor is the weights' bytes over a read rate measured in the same way.

    python -m bench.lora_kernels [--budget 50] [--external module:function] [--dry-run]
    python -m bench.lora_kernels --device cpu [--shape smollm2|h4096] [--adapters 8] [--rank 16] [--cpu-time]
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable

import click
import torch

from specserve.kernels.lora_stack import LoraPair, LoraStack, add_lora_
from specserve.kernels.segments import Segments

from . import common
from .gpu_timing import copy_bandwidth
from .shapes import LLAMA8B, SMOLLM2

Clock = Callable[[], float]  # seconds

# shape -> (layers, fused linears as (in, out sizes))
SHAPES = {
    "smollm2": (SMOLLM2.num_layers, list(SMOLLM2.fused_linears().values())),
    "h4096": (2, list(LLAMA8B.fused_linears().values())),
}


class Workload:
    """Stacks and activations of one forward pass; `rows` rows for each of the adapters."""

    def __init__(self, linears, num_layers: int, num_adapters: int, rank: int, rows: int):
        self.linears, self.num_adapters, self.rows = linears, num_adapters, rows
        self.num_rows = num_adapters * rows
        self.slots = [
            [
                [
                    [
                        LoraPair(
                            torch.randn(rank, in_size) / in_size**0.5,
                            torch.randn(out_size, rank),
                            1.0,
                        )
                        for out_size in out_sizes
                    ]
                    for _ in range(num_adapters)
                ]
                for in_size, out_sizes in linears
            ]
            for _ in range(num_layers)
        ]  # [layer][fused linear][adapter][module]
        self.stacks = [
            [LoraStack(slots, out_sizes) for slots, (_, out_sizes) in zip(layer, linears, strict=True)]
            for layer in self.slots
        ]
        # A [n, in, summed R] and per module B [n, R, out], what a bmm wants; contiguous.
        self.stacked = [
            [
                (
                    torch.stack([torch.cat([pair.a for pair in modules]).t() for modules in slots]),
                    [torch.stack([modules[m].b.t() for modules in slots]) for m in range(len(slots[0]))],
                )
                for slots in layer
            ]
            for layer in self.slots
        ]
        self.x = {i: torch.randn(self.num_rows, i) for i, _ in linears}
        self.y = [torch.zeros(self.num_rows, sum(out)) for _, out in linears]

    @property
    def weight_bytes(self) -> int:
        pairs = [p for layer in self.slots for linear in layer for modules in linear for p in modules]
        return sum(pair.a.nbytes + pair.b.nbytes for pair in pairs)

    def ours(self) -> None:
        runs = [(slot, self.rows) for slot in range(self.num_adapters)]
        segments = Segments.build(runs, self.num_adapters)
        for layer in self.stacks:
            for stack, (in_size, _), y in zip(layer, self.linears, self.y, strict=True):
                add_lora_(y, self.x[in_size], stack, segments)

    def loop(self) -> None:
        for layer in self.stacked:
            for (a, bs), (in_size, _), y in zip(layer, self.linears, self.y, strict=True):
                for n in range(self.num_adapters):
                    rows = slice(n * self.rows, (n + 1) * self.rows)
                    h = self.x[in_size][rows] @ a[n]  # [rows, summed R]
                    column = 0
                    for m, b in enumerate(bs):
                        rank, out_size = b.shape[1:]
                        y[rows, column : column + out_size].addmm_(h[:, m * rank : (m + 1) * rank], b[n])
                        column += out_size

    def bmm(self) -> None:
        for layer in self.stacked:
            for (a, bs), (in_size, _), y in zip(layer, self.linears, self.y, strict=True):
                h = torch.bmm(self.x[in_size].view(self.num_adapters, self.rows, -1), a)  # [n, rows, summed R]
                column = 0
                for m, b in enumerate(bs):
                    rank, out_size = b.shape[1:]
                    delta = torch.bmm(h[:, :, m * rank : (m + 1) * rank], b)  # [n, rows, out]
                    y[:, column : column + out_size] += delta.view(self.num_rows, -1)
                    column += out_size


def time_alternating(ways: dict[str, Callable[[], object]], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Milliseconds of each way in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = clock()
            way()
            times[name].append((clock() - start) * 1e3)
    return {name: values[1:] for name, values in times.items()}


def read_rate(clock: Clock) -> float:
    """Bytes a second that summing a large tensor reads, best of five."""
    data = torch.ones(1 << 25)
    times = time_alternating({"sum": lambda: data.sum()}, 5, clock)["sum"]
    return data.nbytes / (min(times) / 1e3)


def run_cpu(shape: str, num_adapters: int, rank: int, all_rows: tuple[int, ...], rounds: int, cpu_time: bool) -> None:
    clock = time.thread_time if cpu_time else time.perf_counter
    if cpu_time:
        torch.set_num_threads(1)
    num_layers, linears = SHAPES[shape]
    rate = read_rate(clock)
    results = []
    for rows in all_rows:
        work = Workload(linears, num_layers, num_adapters, rank, rows)
        floor_ms = work.weight_bytes / rate * 1e3
        print(
            f"{shape}, {num_layers} layers, {num_adapters} adapters x {rows} rows, rank {rank}: "
            f"floor {floor_ms:.2f} ms ({work.weight_bytes / 1e6:.0f} MB of weights at {rate / 1e9:.1f} GB/s)"
        )
        times = time_alternating({"ours": work.ours, "loop": work.loop, "bmm": work.bmm}, rounds, clock)
        result: dict[str, float | int] = {"rows": rows, "floor_ms": round(floor_ms, 3)}
        for name, values in times.items():
            best, median = min(values), sorted(values)[len(values) // 2]
            ratios = sorted(value / ours for value, ours in zip(values, times["ours"], strict=True))
            ratio = ratios[len(ratios) // 2]
            print(f"  {name:5} best {best:8.2f} ms   median {median:8.2f} ms   {ratio:5.2f} x ours")
            result |= {f"{name}_ms_best": round(best, 3), f"{name}_ms_median": round(median, 3)}
            result |= {f"{name}_over_ours": round(ratio, 3)}
        results.append(result)
    settings = {"shape": shape, "layers": num_layers, "adapters": num_adapters, "rank": rank, "dtype": "torch.float32"}
    setup = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu_time": cpu_time}
    report(f"{platform.machine()} CPU", {**setup, **settings, "results": results})


def run_gpu(device: torch.device, budget: float, external_name: str | None) -> None:
    """The table of lora_gpu's cases; on CPU tensors, small ones under Triton's interpreter."""
    start = time.monotonic()
    from . import lora_gpu

    dry_run = device.type == "cpu"
    bandwidth = copy_bandwidth(device, 1 << 20 if dry_run else 1 << 30)
    external = lora_gpu.load_external(external_name) if external_name else None
    hardware = torch.cuda.get_device_name(device) if not dry_run else "dry run"
    print(f"{hardware}, copies at {bandwidth / 1e12:.2f} TB/s; microseconds of shrink and expand together")
    print(f"{'':8} {'mix':9} rank rows     floor      ours  wanted      loop       bmm  external")
    results, left_out = [], 0
    for case in lora_gpu.cases(dry_run):
        if time.monotonic() - start > budget:
            left_out += 1
            continue
        results.append(lora_gpu.measure(case, bandwidth, device, external))
        print(lora_gpu.row_text(results[-1]), flush=True)
    with_target = [result for result in results if result["wanted_us"] is not None]
    num_missed = sum(result["ours_us"] > result["wanted_us"] for result in with_target)
    print(f"{num_missed} of {len(with_target)} targets missed, {left_out} cases left out")
    versions = common.versions("torch", "triton")
    fields = {**versions, "bandwidth_gb_s": round(bandwidth / 1e9, 1), "left_out": left_out, "results": results}
    report(hardware, fields)


def report(hardware: str, fields: dict[str, object]) -> None:
    common.report("lora_kernels", {"commit": common.commit(), "hardware": hardware, **fields}, save=False)


@click.command()
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--budget", default=50.0, show_default=True, help="GPU: seconds for all cases.")
@click.option("--external", help="GPU: module:function of other kernels (bench/lora_gpu.py, load_external).")
@click.option("--dry-run", is_flag=True, help="The GPU's code path on small CPU tensors, under Triton's interpreter.")
@click.option("--shape", type=click.Choice(list(SHAPES)), default="smollm2", show_default=True)
@click.option("--adapters", "num_adapters", default=8, show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--rows", "all_rows", default=(1, 5), multiple=True, show_default=True, help="Rows an adapter.")
@click.option("--rounds", default=11, show_default=True)
@click.option("--cpu-time", is_flag=True, help="CPU time of one thread instead of wall-clock time.")
@torch.inference_mode()
def main(
    device: str,
    budget: float,
    external: str | None,
    dry_run: bool,
    shape: str,
    num_adapters: int,
    rank: int,
    all_rows: tuple[int, ...],
    rounds: int,
    cpu_time: bool,
) -> None:
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        run_gpu(torch.device("cpu"), budget, external)
    elif device == "cuda" or (device == "auto" and torch.cuda.is_available() and not cpu_time):
        run_gpu(torch.device("cuda"), budget, external)
    else:
        run_cpu(shape, num_adapters, rank, all_rows, rounds, cpu_time)


if __name__ == "__main__":
    main()
