"""What does LoRA add to a step on a GPU, and how far is that from reading the adapters' weights once?

One fused linear at a time, in CUDA graphs, over mixes of adapters, ranks and rows: the floor, our kernels, vLLM's where
docs/performance.md has them (an H100), and what ours add up to in a step of an 8 B model's and of SmolLM2's shape
(bench/lora_gpu.py). `--torch` adds a loop and a bmm in torch; another implementation's kernels can be timed in the same
cases. Processes compile side by side first. Cases are left out once --budget seconds are over, and said to be.

    python -m bench.lora_kernels [--budget 50] [--torch] [--external module:function] [--dry-run]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import click
import torch

from . import common, lora_gpu
from .gpu_timing import copy_bandwidth, read_bandwidth

_COMPILERS = 8


def run(device: torch.device, budget: float, external_name: str | None, *, has_torch: bool) -> None:
    """The table of lora_gpu's cases; on CPU tensors, small ones under Triton's interpreter."""
    start = time.monotonic()
    dry_run = device.type == "cpu"
    if not dry_run:
        compile_all()
    size = 1 << 20 if dry_run else 1 << 30
    bandwidth = max(copy_bandwidth(device, size), read_bandwidth(device, size))
    external = lora_gpu.load_external(external_name) if external_name else None
    hardware = torch.cuda.get_device_name(device) if not dry_run else "dry run"
    ready_s = time.monotonic() - start
    print(f"{hardware}, {bandwidth / 1e12:.2f} TB/s (best of a read and a copy), compiled after {ready_s:.0f} s")
    print(lora_gpu.HEADER)
    results, left_out = [], 0
    for case in lora_gpu.cases(dry_run):
        if time.monotonic() - start > budget:
            left_out += 1
            continue
        results.append(lora_gpu.measure(case, bandwidth, device, external, has_torch=has_torch))
        print(lora_gpu.row_text(results[-1]), flush=True)
    for line in lora_gpu.summary(results):
        print(line)
    print(f"{left_out} cases left out, {time.monotonic() - start:.0f} s")
    versions = common.versions("torch", "triton")
    fields = {**versions, "bandwidth_gb_s": round(bandwidth / 1e9, 1), "left_out": left_out, "results": results}
    common.report("lora_kernels", {"commit": common.commit(), "hardware": hardware, **fields}, save=False)


def compile_all() -> None:
    """Fill Triton's cache from several processes: one after the other the kernels' compilation is most of the time."""
    command = [sys.executable, "-m", "bench.lora_kernels", "--compile-part"]
    children = [subprocess.Popen([*command, str(idx)]) for idx in range(_COMPILERS)]
    for child in children:
        child.wait()


@click.command(help=__doc__.partition("\n")[0])
@click.option("--budget", default=50.0, show_default=True, help="Seconds for all cases.")
@click.option("--torch", "has_torch", is_flag=True, help="Time a loop and a bmm in torch, too.")
@click.option("--external", help="module:function of other kernels (bench/lora_gpu.py, load_external).")
@click.option("--compile-part", type=int, hidden=True)
@click.option("--dry-run", is_flag=True, help="The same on small CPU tensors, under Triton's interpreter.")
@torch.inference_mode()
def main(budget: float, has_torch: bool, external: str | None, compile_part: int | None, dry_run: bool) -> None:
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    elif not torch.cuda.is_available():
        raise click.UsageError("there is no CUDA here; --dry-run does without")
    if compile_part is not None:
        for case in list(lora_gpu.cases(dry_run))[compile_part::_COMPILERS]:
            lora_gpu.compile_case(case, torch.device("cuda"))
        return
    run(torch.device("cpu" if dry_run else "cuda"), budget, external, has_torch=has_torch)


if __name__ == "__main__":
    main()
