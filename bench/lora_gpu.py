"""The GPU part of bench.lora_kernels: one fused linear at a time, floor, ours, a torch loop and a torch bmm.

Owns the cases. Each call is a node of a CUDA graph and has adapters, x and y of its own, as layers have, as far as that
is needed to miss the cache; where few adapters are so small that even MAX_COPIES of them fit it, `cached` says so. The
floor is each adapter's weights once, x once and y twice, over the measured bandwidth of a copy.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from specserve.kernels.lora import LoraPair
from specserve.kernels.lora_tables import LoraShape, LoraTables
from specserve.kernels.lora_tiles import TILE_ROWS, lora_add_, scratch_size
from specserve.kernels.tiles import build_tiles_, max_tiles

from .gpu_timing import seconds_per_call
from .shapes import LLAMA8B

CACHE_BYTES = 192 << 20  # weights that are cycled through: several times the last-level cache
MAX_COPIES = 32
External = Callable[..., Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Case:
    """`wanted_us` is the target on one GPU, None where there is none."""

    name: str
    shape: LoraShape
    mix: str
    rank: int
    rows: int
    wanted_us: float | None


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
    """Those with targets first, then the other sizes, then the fused linears of an 8 B model's layer."""
    if dry_run:
        for mix in ("distinct", "uniform", "zipf", "identical"):
            yield Case("linear", LoraShape(48, (40,)), mix, 4, 5, 1.0)
        yield Case("qkv", LoraShape(48, (40, 16, 16)), "distinct", 4, 3, None)
        return
    layer = {name: LoraShape(*sizes) for name, sizes in LLAMA8B.fused_linears().items()}
    for rows in (64, 1, 8, 32, 128):
        for rank in (16, 64):
            for mix in ("distinct", "uniform", "zipf", "identical"):
                wanted = None if rows != 64 else 20.0 if rank == 64 else 12.0 if mix == "distinct" else 8.0
                if mix == "distinct" and rank == 64:
                    wanted = None  # the bytes alone take 28 us on an H100
                yield Case("linear", layer["o"], mix, rank, rows, wanted)
    for rows in (8, 64):
        for name in ("qkv", "gate_up", "down"):
            yield Case(name, layer[name], "distinct", 16, rows, None)


class Workload:
    """One case on one device, `copies` times over."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device, dtype = case, device, torch.bfloat16
        self.row_slots = row_slots_of(case.mix, case.rows)
        self.num_slots = max(self.row_slots) + 1
        in_size, out_sizes, rank = case.shape.in_size, case.shape.out_sizes, case.rank
        self.weight_bytes = self.num_slots * rank * (len(out_sizes) * in_size + sum(out_sizes)) * dtype.itemsize
        self.copies = min(MAX_COPIES, -(-CACHE_BYTES // self.weight_bytes)) if device.type == "cuda" else 2
        self.cached = self.copies * self.weight_bytes < CACHE_BYTES

        def normal(*size: int) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=device).normal_()

        # [copy][module]: A [n, R, in], B [n, out, R]; adapters are slices, as ours and the loop read them.
        self.a = [[normal(self.num_slots, rank, in_size) for _ in out_sizes] for _ in range(self.copies)]
        self.b = [[normal(self.num_slots, out_size, rank) for out_size in out_sizes] for _ in range(self.copies)]
        self.x = [normal(case.rows, in_size) for _ in range(self.copies)]
        self.y = [normal(case.rows, sum(out_sizes)) for _ in range(self.copies)]
        self.tables = LoraTables(dict.fromkeys(range(self.copies), case.shape), self.num_slots, rank, dtype, device)
        for slot in range(self.num_slots):
            pairs = {
                copy: [LoraPair(a[slot], b[slot], 1.0) for a, b in zip(self.a[copy], self.b[copy], strict=True)]
                for copy in range(self.copies)
            }
            self.tables.set_slot(slot, pairs)
        self.row_ids = torch.tensor(self.row_slots, dtype=torch.int32, device=device)
        num_tiles = max_tiles(case.rows, TILE_ROWS, case.rows)
        self.tiles = torch.empty(num_tiles, 3, dtype=torch.int32, device=device)
        build_tiles_(self.tiles, self.row_ids, TILE_ROWS)
        size = scratch_size(self.tables.entry(0), case.rows)
        self.scratch = torch.empty(size, dtype=torch.float32, device=device)

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.x[0].nbytes + 2 * self.y[0].nbytes

    def ours(self, copy: int) -> None:
        lora_add_(self.y[copy], self.x[copy], self.tables.entry(copy), self.tiles, self.scratch)

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

    def tiles_microseconds(self) -> float:
        return seconds_per_call([lambda: build_tiles_(self.tiles, self.row_ids, TILE_ROWS)], self.device) * 1e6


def load_external(name: str) -> External:
    """`module:function` -> function(y, x, a, b, row_slots) -> a call that adds x's LoRA to y, all of it ready.

    y [T, out], x [T, in]; a [n, R, in] and b [n, out, R] of one module; row_slots [T] int32. It is asked for the cases
    of one module, and what it returns is captured in a graph like the rest.
    """
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def measure(case: Case, bandwidth: float, device: torch.device, external: External | None) -> dict[str, Any]:
    work = Workload(case, device)
    times = {"ours_us": work.microseconds(work.ours), "loop_us": work.microseconds(work.loop)}
    times["bmm_us"] = work.microseconds(work.bmm)
    if external is not None and len(case.shape.out_sizes) == 1:
        prepared = [
            external(work.y[copy], work.x[copy], work.a[copy][0], work.b[copy][0], work.row_ids)
            for copy in range(work.copies)
        ]
        times["external_us"] = seconds_per_call(prepared, device) * 1e6
    return {
        "linear": case.name, "mix": case.mix, "rank": case.rank, "rows": case.rows, "adapters": work.num_slots,
        "cached": work.cached, "floor_us": round(work.bytes / bandwidth * 1e6, 2), "wanted_us": case.wanted_us,
        "tiles_us": round(work.tiles_microseconds(), 2), **{name: round(value, 2) for name, value in times.items()},
    }  # fmt: skip


def row_text(result: dict[str, Any]) -> str:
    wanted = "" if result["wanted_us"] is None else f"{result['wanted_us']:.0f}"
    cells = [f"{result[key]:9.2f}" if key in result else "" for key in ("floor_us", "ours_us")]
    cells += [f"{wanted:>7}"]
    cells += [f"{result[key]:9.2f}" for key in ("loop_us", "bmm_us", "external_us") if key in result]
    return f"{result['linear']:8} {result['mix']:9} {result['rank']:4} {result['rows']:4} " + " ".join(cells)
