"""Runs a kernel bench's cases on a GPU within a budget: the limit first, a line a case, all of it as one JSON line."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import torch

from . import common
from .gpu_timing import copy_bandwidth

Case = Callable[[], dict[str, Any]]


def run_cases(name: str, plan: Callable[[float, torch.device], Sequence[Case]], budget_s: float, is_dry: bool) -> None:
    """Run what `plan(bytes a second of a copy, device)` gives; no case is begun after `budget_s` seconds.

    A case that fails on a card, for want of memory say, is told and the others go on; the exit status is 1 then.
    `is_dry` is for tiny cases on the CPU under Triton's interpreter.
    """
    end = time.monotonic() + budget_s
    if is_dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before the first launch imports triton
    elif not torch.cuda.is_available():
        raise click.UsageError("this bench needs a CUDA device; --dry-run runs tiny sizes without one")
    device = torch.device("cpu" if is_dry else "cuda")
    limit = copy_bandwidth(device, 1 << 20 if is_dry else 1 << 30)
    machine = f"{common.hardware()['cpu']}, dry run" if is_dry else torch.cuda.get_device_name()
    click.echo(f"limit: {limit / 1e9:.0f} GB/s read and written by a copy on {machine}")
    results, left_out, failed = [], 0, list[str]()
    for case in plan(limit, device):
        if time.monotonic() > end:
            left_out += 1
            continue
        try:
            results.append(case())
        except Exception as error:
            if is_dry:
                raise
            failed.append(f"{type(error).__name__}: {error}")
            click.echo(f"a case failed: {failed[-1]}")
        else:
            click.echo("  ".join(f"{key} {value}" for key, value in results[-1].items()))
        if not is_dry:
            torch.cuda.empty_cache()
    if left_out:
        click.echo(f"{left_out} cases are left out: the budget of {budget_s:g} s is over")
    setup = {"commit": common.commit(), "torch": torch.__version__, "hardware": machine, "dry_run": is_dry}
    limits = {"copy_gb_s": round(limit / 1e9, 1), "left_out": left_out, "failed": failed}
    common.report(name, {**setup, **limits, "results": results}, save=False)
    if failed:
        sys.exit(1)


def case_command(
    name: str, doc: str, plan: Callable[[bool, float, torch.device], Sequence[Case]], *, budget_s: float
) -> click.Command:
    """The command of a bench whose cases `plan(is_dry, limit, device)` gives, described by the first line of `doc`."""

    @click.command(name, help=doc.partition("\n")[0])
    @click.option("--budget", default=budget_s, show_default=True, help="No case is begun after so many seconds.")
    @click.option("--dry-run", "is_dry", is_flag=True, help="Tiny sizes on the CPU under Triton's interpreter.")
    @torch.inference_mode()
    def main(budget: float, is_dry: bool) -> None:
        run_cases(name, lambda limit, device: plan(is_dry, limit, device), budget, is_dry)

    return main
