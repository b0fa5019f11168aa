"""On a GPU: at how many rows do weights of 8 bits pay, against 16 bits in cuBLAS and in our kernel?

The base model's linears and lm_head by themselves: weights, rows and outputs over the read bandwidth are the floor, of
16 and of 8 bits. Every call has a weight of its own, as layers have, as far as that is needed to miss the cache.
`step` adds a model's up.

    python -m bench.scaled_weights [--budget 40] [--dry-run]
"""

from __future__ import annotations

import functools
from typing import Any

import click
import torch
import torch.nn.functional as F

from specserve.kernels.linear_rows import linear_rows, release_order
from specserve.kernels.scaled_weights import DTYPES, ScaledLinear

from .gpu_cases import Case, case_command
from .gpu_timing import read_bandwidth, seconds_per_call
from .linear_rows import Linears, cases_of, hold
from .shapes import LLAMA8B, SMOLLM2, TINY, ModelShape

NUM_ROWS = (1, 8, 32, 128, 512)
WAYS = ("floor of 16 bits", "floor of 8 bits", "cublas", "one order", *DTYPES)


def one_shape(
    shape: ModelShape, name: str, in_size: int, out_size: int, counts: tuple[int, ...], limit: float,
    device: torch.device, sums: dict[int, list[float]], times: int,
) -> dict[str, Any]:  # fmt: skip
    """Microseconds of WAYS by rows; adds `times` them to `sums`."""
    work = Linears(in_size, out_size, max(counts), device)
    seconds: dict[int, list[float]] = {}
    for num in counts:
        floor = work.floor_s(num, limit)
        seconds[num] = [floor, floor - in_size * out_size / limit, work.seconds(F.linear, num)]
    hold(device)
    try:
        for num in counts:
            seconds[num].append(work.seconds(linear_rows, num))
    finally:
        release_order()
    for form in DTYPES:
        linears = [ScaledLinear(weight, None, form) for weight in work.weights]
        for num in counts:
            calls = [functools.partial(linear, work.x[:num]) for linear in linears]
            seconds[num].append(seconds_per_call(calls, device))
    result: dict[str, Any] = {"kind": name, "shape": shape.name, "K": in_size, "N": out_size}
    for num, values in seconds.items():
        result[f"us_{num}"] = [round(value * 1e6, 2) for value in values]
        before = sums.get(num, [0.0] * len(values))
        sums[num] = [total + times * value for total, value in zip(before, values, strict=True)]
    return result


def step(shape: ModelShape, sums: dict[int, list[float]]) -> dict[str, Any]:
    result: dict[str, Any] = {"kind": "step", "shape": shape.name}
    for num, values in sums.items():
        by_way = dict(zip(WAYS, values, strict=True))
        result[f"ms_{num}"] = [round(value * 1e3, 3) for value in values]
        fastest = min(by_way["cublas"], by_way["one order"])
        result[f"of_16_bits_{num}"] = {form: round(by_way[form] / fastest, 3) for form in DTYPES}
    return result


def plan(is_dry: bool, limit: float, device: torch.device) -> list[Case]:
    limit = max(limit, read_bandwidth(device, 1 << 20 if is_dry else 1 << 30))
    click.echo(f"by rows: us of [{', '.join(WAYS)}], floors at {limit / 1e9:.0f} GB/s read")
    counts, shapes = ((2, 65), (TINY,)) if is_dry else (NUM_ROWS, (LLAMA8B, SMOLLM2))
    return cases_of(one_shape, step, shapes, counts, limit, device)


main = case_command("scaled_weights", __doc__, plan, budget_s=40.0)


if __name__ == "__main__":
    main()
