"""What does LoRA add to a step, and how far is that from reading the adapters' weights once?

Times every LoRA product of one forward pass (q/k/v, o, gate/up, down in every layer) for a mixed batch, against the
two obvious ways to write it: a loop over adapters with addmm_, and one torch.bmm per module over stacked weights (which
needs equal ranks and equal rows, as in the batches timed here). The ways alternate within each round, so that their
ratio survives a machine that slows down; where others keep its cores busy, --cpu-time compares the CPU time of one
thread instead. The floor is the weights' bytes over a read rate measured in the same way.

    python bench/lora_kernels.py [--shape smollm2|h4096] [--adapters 8] [--rank 16] [--rounds 11] [--cpu-time]
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from specserve.kernels.lora_stack import LoraPair, LoraStack, add_lora_
from specserve.kernels.segments import Segments

Clock = Callable[[], float]  # seconds

# shape -> (layers on CUDA, layers on the CPU, fused linears as (in, out sizes))
SHAPES: dict[str, tuple[int, int, list[tuple[int, tuple[int, ...]]]]] = {
    "smollm2": (30, 30, [(576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,))]),
    "h4096": (32, 2, [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))]),
}


class Workload:
    """Stacks and activations of one forward pass; `rows` rows for each of the adapters."""

    def __init__(self, linears, num_layers: int, num_adapters: int, rank: int, rows: int, dtype, device: str):
        self.linears, self.num_adapters, self.rows, self.device = linears, num_adapters, rows, device
        self.num_rows = num_adapters * rows
        self.slots = [
            [
                [
                    [
                        LoraPair(
                            torch.randn(rank, in_size, device=device, dtype=dtype) / in_size**0.5,
                            torch.randn(out_size, rank, device=device, dtype=dtype),
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
        self.x = {i: torch.randn(self.num_rows, i, device=device, dtype=dtype) for i, _ in linears}
        self.y = [torch.zeros(self.num_rows, sum(out), device=device, dtype=dtype) for _, out in linears]

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


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def time_alternating(
    ways: dict[str, Callable[[], object]], rounds: int, device: str, clock: Clock
) -> dict[str, list[float]]:
    """Milliseconds of each way in each round, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            synchronize(device)
            start = clock()
            way()
            synchronize(device)
            times[name].append((clock() - start) * 1e3)
    return {name: values[1:] for name, values in times.items()}


def read_rate(device: str, clock: Clock) -> float:
    """Bytes a second that summing a large tensor reads, best of five."""
    data = torch.ones(1 << (28 if device == "cuda" else 25), device=device)
    times = time_alternating({"sum": lambda: data.sum()}, 5, device, clock)["sum"]
    return data.nbytes / (min(times) / 1e3)


def git_commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="smollm2", show_default=True)
@click.option("--adapters", "num_adapters", default=8, show_default=True)
@click.option("--rank", default=16, show_default=True)
@click.option("--rows", "all_rows", default=(1, 5), multiple=True, show_default=True, help="Rows an adapter.")
@click.option("--rounds", default=11, show_default=True)
@click.option("--cpu-time", is_flag=True, help="CPU time of one thread instead of wall-clock time.")
@torch.inference_mode()
def main(shape: str, num_adapters: int, rank: int, all_rows: tuple[int, ...], rounds: int, cpu_time: bool) -> None:
    device = "cuda" if torch.cuda.is_available() and not cpu_time else "cpu"
    clock = time.thread_time if cpu_time else time.perf_counter
    if cpu_time:
        torch.set_num_threads(1)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    cuda_layers, cpu_layers, linears = SHAPES[shape]
    num_layers = cuda_layers if device == "cuda" else cpu_layers
    rate = read_rate(device, clock)
    results = []
    for rows in all_rows:
        work = Workload(linears, num_layers, num_adapters, rank, rows, dtype, device)
        floor_ms = work.weight_bytes / rate * 1e3
        print(
            f"{shape}, {num_layers} layers, {num_adapters} adapters x {rows} rows, rank {rank}: "
            f"floor {floor_ms:.2f} ms ({work.weight_bytes / 1e6:.0f} MB of weights at {rate / 1e9:.1f} GB/s)"
        )
        times = time_alternating({"ours": work.ours, "loop": work.loop, "bmm": work.bmm}, rounds, device, clock)
        result: dict[str, float | int] = {"rows": rows, "floor_ms": round(floor_ms, 3)}
        for name, values in times.items():
            best, median = min(values), sorted(values)[len(values) // 2]
            ratios = sorted(value / ours for value, ours in zip(values, times["ours"], strict=True))
            ratio = ratios[len(ratios) // 2]
            print(f"  {name:5} best {best:8.2f} ms   median {median:8.2f} ms   {ratio:5.2f} x ours")
            result |= {f"{name}_ms_best": round(best, 3), f"{name}_ms_median": round(median, 3)}
            result |= {f"{name}_over_ours": round(ratio, 3)}
        results.append(result)
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    settings = {"shape": shape, "layers": num_layers, "adapters": num_adapters, "rank": rank, "dtype": str(dtype)}
    setup = {
        "commit": git_commit(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_time": cpu_time,
    }
    print(json.dumps({"bench": "lora_kernels", "hardware": hardware, **setup, **settings, "results": results}))


if __name__ == "__main__":
    main()
