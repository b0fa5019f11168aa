"""What does LoRA add to a step on a GPU, and how far is that from reading the adapters' weights once?

One fused linear at a time, in CUDA graphs, over mixes of adapters, ranks and rows, with the targets beside
(bench/lora_gpu.py); another implementation's kernels can be timed in the same cases. Cases are left out once --budget
seconds are over, and said to be.

    python -m bench.lora_kernels [--budget 50] [--external module:function] [--dry-run]
"""

from __future__ import annotations

import os
import time

import click
import torch

from . import common, lora_gpu
from .gpu_timing import copy_bandwidth


def run(device: torch.device, budget: float, external_name: str | None) -> None:
    """The table of lora_gpu's cases; on CPU tensors, small ones under Triton's interpreter."""
    start = time.monotonic()
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
    common.report("lora_kernels", {"commit": common.commit(), "hardware": hardware, **fields}, save=False)


@click.command(help=__doc__.partition("\n")[0])
@click.option("--budget", default=50.0, show_default=True, help="Seconds for all cases.")
@click.option("--external", help="module:function of other kernels (bench/lora_gpu.py, load_external).")
@click.option("--dry-run", is_flag=True, help="The same on small CPU tensors, under Triton's interpreter.")
@torch.inference_mode()
def main(budget: float, external: str | None, dry_run: bool) -> None:
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    elif not torch.cuda.is_available():
        raise click.UsageError("there is no CUDA here; --dry-run does without")
    run(torch.device("cpu" if dry_run else "cuda"), budget, external)


if __name__ == "__main__":
    main()
