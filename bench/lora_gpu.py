"""The GPU part of bench.lora_kernels: one fused linear at a time, floor, ours, a torch loop and a torch bmm.

Owns the cases. Each call is a node of a CUDA graph and has adapters, x and y of its own, as layers have, as far as that
is needed to miss the cache; where few adapters are so small that even MAX_COPIES of them fit it, `cached` says so. The
floor is each adapter's weights once, x once and y twice, over the best measured bandwidth. Tables are for ranks up to
MAX_RANK, as an engine's are by default.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from specserve.kernels.lora import LoraPair
from specserve.kernels.lora_blocks import list_blocks_, lora_add_, max_blocks, new_blocks, scratch_size
from specserve.kernels.lora_tables import LoraShape, LoraTables

from .gpu_timing import seconds_per_call
from .shapes import LLAMA8B, SMOLLM2, ModelShape

CACHE_BYTES = 192 << 20  # weights that are cycled through: several times the last-level cache
MAX_COPIES = 32
MAX_RANK = 256
# vLLM 0.32's Triton kernels on an H100, from docs/performance.md: (rows, rank, mix) -> microseconds.
VLLM_US = {
    (1, 16, "distinct"): 7.9, (1, 64, "distinct"): 9.9, (8, 16, "distinct"): 11.2, (8, 64, "distinct"): 17.9,
    (64, 16, "distinct"): 40.3, (64, 16, "uniform"): 11.4, (64, 16, "zipf"): 17.8, (64, 16, "identical"): 9.2,
    (64, 64, "distinct"): 96.5, (64, 64, "uniform"): 17.9, (64, 64, "zipf"): 36.3, (64, 64, "identical"): 11.7,
    (128, 64, "distinct"): 116.0, (128, 64, "uniform"): 22.1, (128, 64, "identical"): 19.0,
}  # fmt: skip
External = Callable[..., Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Case:
    """A fused linear of a model, and the rows that meet it."""

    name: str
    shape: LoraShape
    mix: str
    rank: int
    rows: int
    model: str = ""


def row_slots_of(mix: str, num_rows: int) -> list[int]:
    """Sorted adapter slots of the rows; the mixes are those of arXiv:2310.18547."""
    if mix == "distinct":
        return list(range(num_rows))
    if mix == "identical":
        return [0] * num_rows
    if mix == "uniform":  # sqrt(n) adapters, equally liked
        num_slots = max(1, round(num_rows**0.5))
        return sorted(row % num_slots for row in range(num_rows))
    assert mix == "zipf", mix
    weights = [1 / (slot + 1) ** 1.5 for slot in range(num_rows)]
    drawn = random.Random(0).choices(range(num_rows), weights, k=num_rows)
    order = {slot: index for index, slot in enumerate(sorted(set(drawn)))}
    return sorted(order[slot] for slot in drawn)


def cases(dry_run: bool) -> Iterator[Case]:
    """Those with targets first, then what a step is the sum of, then the other sizes."""
    if dry_run:
        for mix in ("distinct", "uniform", "zipf", "identical"):
            yield Case("linear", LoraShape(48, (40,)), mix, 4, 5)
        yield Case("qkv", LoraShape(48, (40, 16, 16)), "distinct", 4, 3)
        return
    linear = LoraShape(4096, (4096,))
    for rows, rank in ((64, 16), (64, 64), (1, 16), (1, 64), (128, 64)):
        for mix in ("distinct", "uniform", "zipf", "identical") if rows > 1 else ("distinct",):
            yield Case("linear", linear, mix, rank, rows)
    yield from of_layer(LLAMA8B, 16, 32)
    yield from of_layer(SMOLLM2, 16, 1)
    yield from of_layer(LLAMA8B, 16, 64)
    for rows, rank in ((8, 16), (8, 64), (32, 16), (32, 64), (512, 16), (512, 64)):
        for mix in ("distinct", "uniform", "identical") if rows < 512 else ("uniform", "identical"):
            yield Case("linear", linear, mix, rank, rows)


def of_layer(model: ModelShape, rank: int, rows: int) -> Iterator[Case]:
    for name, sizes in model.fused_linears().items():
        yield Case(name, LoraShape(*sizes), "distinct", rank, rows, model.name)


class Workload:
    """One case on one device, `copies` times over."""

    def __init__(self, case: Case, device: torch.device, max_copies: int = MAX_COPIES):
        self.case, self.device, dtype = case, device, torch.bfloat16
        self.row_slots = row_slots_of(case.mix, case.rows)
        self.num_slots = max(self.row_slots) + 1
        in_size, out_sizes, rank = case.shape.in_size, case.shape.out_sizes, case.rank
        self.weight_bytes = self.num_slots * rank * (len(out_sizes) * in_size + sum(out_sizes)) * dtype.itemsize
        copies = min(MAX_COPIES, -(-CACHE_BYTES // self.weight_bytes)) if device.type == "cuda" else 2
        self.copies = min(copies, max_copies)
        self.cached = self.copies * self.weight_bytes < CACHE_BYTES

        def normal(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device).normal_()

        # [copy][module]: A [n, R, in], B [n, out, R]; adapters are slices, as ours and the loop read them.
        self.a = [[normal(self.num_slots, rank, in_size) for _ in out_sizes] for _ in range(self.copies)]
        self.b = [[normal(self.num_slots, out_size, rank) for out_size in out_sizes] for _ in range(self.copies)]
        self.x = [normal(case.rows, in_size) for _ in range(self.copies)]
        self.y = [normal(case.rows, sum(out_sizes)) for _ in range(self.copies)]
        shapes = dict.fromkeys(range(copies), case.shape)
        self.tables = LoraTables(shapes, self.num_slots, MAX_RANK, dtype, device)
        for slot in range(self.num_slots):
            pairs = {
                copy: [LoraPair(a[slot], b[slot], 1.0) for a, b in zip(self.a[copy], self.b[copy], strict=True)]
                for copy in range(self.copies)
            }
            self.tables.set_slot(slot, pairs)
        self.row_ids = torch.tensor(self.row_slots, dtype=torch.int32, device=device)
        self.blocks = new_blocks(max_blocks(case.rows, case.rows, self.tables), device)
        self.list_blocks()
        size = scratch_size(self.tables.entry(0), case.rows)
        self.scratch = torch.empty(size, dtype=torch.float32, device=device)

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.x[0].nbytes + 2 * self.y[0].nbytes

    def list_blocks(self) -> None:
        list_blocks_(self.blocks, self.row_ids, self.tables)

    def ours(self, copy: int) -> None:
        lora_add_(self.y[copy], self.x[copy], self.tables.entry(copy), self.blocks, self.scratch)

    def difference(self) -> float:
        """The largest one between the kernels' y and the loop's in torch, over its largest value."""
        results = []
        before = self.y[0].clone()
        for way in (self.loop, self.ours):
            self.y[0].zero_()
            way(0)
            results.append(self.y[0].float())
        self.y[0].copy_(before)
        return ((results[0] - results[1]).abs().max() / results[0].abs().max()).item()

    def loop(self, copy: int) -> None:
        """A product for each adapter and module over its rows, which are adjacent."""
        for slot in range(self.num_slots):
            start = self.row_slots.index(slot)
            rows, column = slice(start, start + self.row_slots.count(slot)), 0
            for a, b in zip(self.a[copy], self.b[copy], strict=True):
                out_size = b.shape[1]
                y = self.y[copy][rows, column : column + out_size]
                y.addmm_(self.x[copy][rows] @ a[slot].t(), b[slot].t())
                column += out_size

    def bmm(self, copy: int) -> None:
        """Two batched products a module over each row's weights, which are gathered unless every row has its own."""
        column = 0
        for a, b in zip(self.a[copy], self.b[copy], strict=True):
            if self.num_slots < len(self.row_slots):
                a, b = a[self.row_ids], b[self.row_ids]
            out_size = b.shape[1]
            h = torch.bmm(a, self.x[copy][:, :, None])  # [T, R, 1]
            self.y[copy][:, column : column + out_size] += torch.bmm(b, h)[:, :, 0]
            column += out_size

    def microseconds(self, way: Callable[[int], object]) -> float:
        calls = [lambda copy=copy: way(copy) for copy in range(self.copies)]
        return seconds_per_call(calls, self.device) * 1e6


def compile_case(case: Case, device: torch.device) -> None:
    """Launch a case's kernels once, with tables of as many copies as are timed, whose strides kernels may know."""
    work = Workload(case, device, max_copies=1)
    work.ours(0)
    torch.cuda.synchronize()


def load_external(name: str) -> External:
    """`module:function` -> function(y, x, a, b, row_slots) -> a call that adds x's LoRA to y, all of it ready.

    y [T, out], x [T, in]; a [n, R, in] and b [n, out, R] of one module; row_slots [T] int32. It is asked for the cases
    of one module, and what it returns is captured in a graph like the rest.
    """
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def measure(
    case: Case, bandwidth: float, device: torch.device, external: External | None, *, has_torch: bool
) -> dict[str, Any]:
    work = Workload(case, device)
    result: dict[str, Any] = {
        "linear": case.name, "model": case.model, "mix": case.mix, "rank": case.rank, "rows": case.rows,
        "adapters": work.num_slots, "cached": work.cached, "floor_us": work.bytes / bandwidth * 1e6,
        "difference": work.difference(), "us": work.microseconds(work.ours),
        "list_us": seconds_per_call([work.list_blocks], device) * 1e6,
    }  # fmt: skip
    if not case.model and (case.rows, case.rank, case.mix) in VLLM_US:
        result["vllm_h100_us"] = VLLM_US[case.rows, case.rank, case.mix]
    if has_torch:
        result |= {"loop_us": work.microseconds(work.loop), "bmm_us": work.microseconds(work.bmm)}
    if external is not None and len(case.shape.out_sizes) == 1:
        prepared = [
            external(work.y[copy], work.x[copy], work.a[copy][0], work.b[copy][0], work.row_ids)
            for copy in range(work.copies)
        ]
        result["external_us"] = seconds_per_call(prepared, device) * 1e6
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}


_COLUMNS = ("floor_us", "us", "vllm_h100_us", "loop_us", "bmm_us", "external_us")
HEADER = (
    f"{'':16} {'mix':9} rank rows     floor      ours  vLLM H100     loop       bmm  external     ours/floor  differ"
)


def row_text(result: dict[str, Any]) -> str:
    """A line of the table, microseconds of shrink and expand together; * where the weights fit the cache."""
    name = f"{result['model']} {result['linear']}".strip() + "*" * result["cached"]
    cells = [f"{result[key]:9.2f}" if key in result else f"{'':9}" for key in _COLUMNS]
    ratio = result["us"] / result["floor_us"]
    return (
        f"{name:16} {result['mix']:9} {result['rank']:4} {result['rows']:4} {' '.join(cells)} {ratio:14.2f}"
        f" {result['difference']:7.0e}"
    )


def summary(results: list[dict[str, Any]]) -> Iterator[str]:
    """What LoRA on all linears adds to a step, by the cases of whole layers."""
    for model, rows in ((LLAMA8B, 32), (SMOLLM2, 1)):
        layer = [result for result in results if (result["model"], result["rows"]) == (model.name, rows)]
        if len(layer) == len(model.fused_linears()):
            sums = [sum(result[key] for result in layer) * model.num_layers / 1e3 for key in _COLUMNS[:2]]
            yield f"{model.name}, {rows} rows, {model.num_layers} layers: floor {sums[0]:.3f} ms, ours {sums[1]:.3f}"
