"""What does the same order of sums at every number of rows cost on a GPU, against cuBLAS as it is?

The base model's linears and lm_head by themselves: weights, rows and outputs over the read bandwidth are the floor.
Every call has a weight of its own, as layers have, as far as that is needed to miss the cache. `step` adds a model's
up. `differ` says at which of the numbers of rows a row has other bits than alone, by either.

    python -m bench.linear_rows [--budget 28] [--dry-run]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import click
import torch
import torch.nn.functional as F

from specserve.kernels.linear_rows import hold_one_order, linear_rows, release_order, rows_that_differ

from .gpu_cases import Case, case_command
from .gpu_timing import read_bandwidth, seconds_per_call
from .shapes import LLAMA8B, SMOLLM2, TINY, ModelShape

NUM_ROWS = (1, 8, 32, 64, 128, 256, 2048)
CACHE_BYTES = 192 << 20  # weights that are cycled through: several times the last-level cache
MAX_COPIES = 128


class Linears:
    """A model's products of one shape: `copies` weights [N, K] and rows."""

    def __init__(self, in_size: int, out_size: int, most_rows: int, device: torch.device):
        self.device, self.in_size, self.out_size = device, in_size, out_size
        num_copies = max(1, min(MAX_COPIES, CACHE_BYTES // (2 * in_size * out_size))) if device.type == "cuda" else 1
        self.weights = [self.normal(out_size, in_size) for _ in range(num_copies)]
        self.x = self.normal(most_rows, in_size)

    def normal(self, *size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=self.device).normal_()

    def seconds(self, product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], num_rows: int) -> float:
        x = self.x[:num_rows]
        return seconds_per_call([lambda w=w: product(x, w) for w in self.weights], self.device)

    def floor_s(self, num_rows: int, limit: float) -> float:
        return 2 * (self.in_size * self.out_size + num_rows * (self.in_size + self.out_size)) / limit


def hold(device: torch.device) -> None:
    reason = hold_one_order() if device.type == "cuda" else None
    if reason is not None:
        raise click.ClickException(reason)


def sizes_of(shape: ModelShape) -> Iterator[tuple[str, int, int, int]]:
    """(name, K, N, how many of them a step has)."""
    for name, (in_size, out_sizes) in shape.fused_linears().items():
        yield name, in_size, sum(out_sizes), shape.num_layers
    yield "lm_head", shape.hidden_size, shape.vocab_size, 1


def one_shape(
    shape: ModelShape, name: str, in_size: int, out_size: int, counts: tuple[int, ...], limit: float,
    device: torch.device, sums: dict[int, list[float]], times: int,
) -> dict[str, Any]:  # fmt: skip
    """Microseconds (floor, cuBLAS, ours) by rows; adds `times` them to `sums`."""
    work = Linears(in_size, out_size, max(counts), device)
    checked = tuple(num for num in counts if num <= 256)
    cublas_differs = rows_that_differ(work.weights[0], checked)
    cublas = {num: work.seconds(F.linear, num) for num in counts}
    hold(device)
    try:
        ours = {num: work.seconds(linear_rows, num) for num in counts}
        ours_differs = rows_that_differ(work.weights[0], checked)
    finally:
        release_order()
    result: dict[str, Any] = {"kind": name, "shape": shape.name, "K": in_size, "N": out_size}
    for num in counts:
        seconds = (work.floor_s(num, limit), cublas[num], ours[num])
        result[f"us_{num}"] = [round(value * 1e6, 2) for value in seconds]
        sums[num] = [total + times * value for total, value in zip(sums.get(num, [0.0] * 3), seconds, strict=True)]
    return result | {"differ": {"tiled and cublas": cublas_differs, "ours": ours_differs}}


def step(shape: ModelShape, sums: dict[int, list[float]]) -> dict[str, Any]:
    result: dict[str, Any] = {"kind": "step", "shape": shape.name}
    for num, (floor, cublas, ours) in sums.items():
        result[f"ms_{num}"] = [round(value * 1e3, 3) for value in (floor, cublas, ours)]
        result[f"ratio_{num}"] = round(ours / cublas, 3)
    return result


def cases_of(
    one_shape: Callable[..., dict[str, Any]],
    step: Callable[[ModelShape, dict[int, list[float]]], dict[str, Any]],
    shapes: Iterable[ModelShape],
    *given: Any,
) -> list[Case]:
    """`one_shape` of each size of a model's linears, which adds to sums by rows; then `step` of these."""
    cases: list[Case] = []
    for shape in shapes:
        sums: dict[int, list[float]] = {}
        for name, in_size, out_size, times in sizes_of(shape):
            cases.append(functools.partial(one_shape, shape, name, in_size, out_size, *given, sums, times))
        cases.append(functools.partial(step, shape, sums))
    return cases


def plan(is_dry: bool, limit: float, device: torch.device) -> list[Case]:
    limit = max(limit, read_bandwidth(device, 1 << 20 if is_dry else 1 << 30))
    click.echo(f"by rows: us of [floor at {limit / 1e9:.0f} GB/s read, cuBLAS, one order]")
    counts, shapes = ((2, 65), (TINY,)) if is_dry else (NUM_ROWS, (SMOLLM2, LLAMA8B))
    return cases_of(one_shape, step, shapes, counts, limit, device)


main = case_command("linear_rows", __doc__, plan, budget_s=28.0)


if __name__ == "__main__":
    main()
