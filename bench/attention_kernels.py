"""How near to the memory's bandwidth do attention and the row-wise kernels of the GPU's forward pass come?

Decodes read K and V once, so the limit is their bytes over the measured copy bandwidth; a verification of 8 rows should
cost what one row costs; a prefill chunk is bound by arithmetic and is given in TFLOP/s. torch's SDPA over contiguous KV
is the comparison (it needs no block table and no ragged rows). Every call has a KV of its own, as layers have, as far
as that is needed to miss the cache. Cases are left out once --budget seconds are over, and said to be. --before times
attention as it was (attention_before.py) beside today's, case by case; --tile-rows the other sizes of prefill's tiles.

    python -m bench.attention_kernels [--budget 50] [--only decode,verify,prefill,rows] [--before] [--tile-rows]
                                      [--dry-run]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch
import torch.nn.functional as F

from specserve.kernels.add_norm import add_rms_norm_
from specserve.kernels.device_limits import shared_bytes
from specserve.kernels.gated_activation import gated_activation
from specserve.kernels.ragged_attention import (
    MAX_BLOCK_M,
    MOST_JOINED,
    attention_scratch,
    choose_programs,
    choose_split_len,
    largest_tile_rows,
    ragged_attention_,
    scratch_row_bytes,
)
from specserve.kernels.rope_kv import rope_store_

from .gpu_cases import Case, run_cases
from .gpu_timing import seconds_per_call
from .shapes import LLAMA8B, SMOLLM2, TINY, ModelShape

BLOCK_SIZE = 16
MAX_MODEL_LEN = 8192  # of an engine, unless a context is longer
CACHE_BYTES = 256 << 20  # KV that is cycled through: several times the last-level cache
MAX_COPIES = 16
COMPARED_BYTES = 4 << 30  # beyond, SDPA's own KV would not fit beside ours


DECODES = [(b, c) for c in (4096, 512, 200, 32768) for b in (8, 1, 64, 256)]  # (batch, context), most telling first


def num_sms_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class Attention:
    """`batch` sequences of `context` keys with `rows` queries each, over shuffled blocks; one call a copy of the KV.

    `is_before`: as attention was.
    """

    def __init__(
        self,
        shape: ModelShape,
        batch: int,
        context: int,
        rows: int,
        tile_rows: int,
        device: torch.device,
        is_before: bool = False,
    ):
        self.shape, self.batch, self.context, self.rows, self.device = shape, batch, context, rows, device
        self.dtype = torch.bfloat16
        num_blocks = -(-context // BLOCK_SIZE)
        self.kv_bytes = 2 * batch * context * shape.num_kv_heads * shape.head_dim * self.dtype.itemsize
        self.copies = max(1, min(MAX_COPIES, CACHE_BYTES // self.kv_bytes)) if device.type == "cuda" else 1
        size = (batch * num_blocks * BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
        self.kv = [[self.normal(*size) for _ in "kv"] for _ in range(self.copies)]
        blocks = torch.randperm(batch * num_blocks, device=device)
        self.block_tables = blocks.to(torch.int32).view(batch, num_blocks)
        self.positions = torch.arange(context - rows, context, device=device).repeat(batch)
        tiles = [
            (start, min(start + tile_rows, (sequence + 1) * rows), sequence)
            for sequence in range(batch)
            for start in range(sequence * rows, (sequence + 1) * rows, tile_rows)
        ]
        self.tiles = torch.tensor(tiles, dtype=torch.int32, device=device)
        self.tile_rows = tile_rows
        self.q = self.normal(batch * rows, shape.num_heads, shape.head_dim)
        self.out = torch.empty(batch * rows, shape.num_heads * shape.head_dim, dtype=self.dtype, device=device)
        self.split_len = choose_split_len(max(MAX_MODEL_LEN, context))
        row_bytes = scratch_row_bytes(shape.num_heads, shape.head_dim)
        self.attend_, choose = ragged_attention_, choose_programs
        if is_before:
            from .attention_before import attention_before_, programs_before

            self.attend_, choose = attention_before_, programs_before
        self.num_programs = choose(len(tiles), shape.num_kv_heads, num_sms_of(device), row_bytes, len(self.q))
        self.scratch = None
        if self.num_programs > 1:
            self.scratch = attention_scratch(len(self.q), shape.num_heads, shape.head_dim, device)
        self.arrived = None
        if tile_rows * (shape.num_heads // shape.num_kv_heads) <= MOST_JOINED:
            self.arrived = torch.zeros(len(tiles) * shape.num_kv_heads, dtype=torch.int32, device=device)

    def normal(self, *size: int) -> torch.Tensor:
        return torch.empty(size, dtype=self.dtype, device=self.device).normal_()

    def attend(self, copy: int) -> None:
        self.attend_(
            self.out, self.q, *self.kv[copy], self.tiles, self.positions, self.block_tables, self.scratch, self.arrived,
            block_size=BLOCK_SIZE, scale=self.shape.head_dim**-0.5, window=None, split_len=self.split_len,
            num_programs=self.num_programs, tile_rows=self.tile_rows,
        )  # fmt: skip

    def seconds(self) -> float:
        calls = [lambda copy=copy: self.attend(copy) for copy in range(self.copies)]
        return seconds_per_call(calls, self.device)

    def sdpa_seconds(self) -> float:
        """The same rows over contiguous KV, [B, heads, rows, D]; causal only where rows are the whole context."""
        shape = self.shape
        q = self.normal(self.batch, shape.num_heads, self.rows, shape.head_dim)
        kv = [
            [self.normal(self.batch, shape.num_kv_heads, self.context, shape.head_dim) for _ in "kv"]
            for _ in range(self.copies)
        ]
        causal = self.rows == self.context
        calls = [
            lambda k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True) for k, v in kv
        ]
        return seconds_per_call(calls, self.device)


@dataclass(frozen=True, slots=True)
class Ways:
    """What is timed beside today's attention."""

    before: bool
    tile_rows: bool


def decode(
    shape: ModelShape, batch: int, context: int, limit: float, device: torch.device, ways: Ways
) -> dict[str, Any]:
    work = Attention(shape, batch, context, 1, 1, device)
    seconds = work.seconds()
    result = {
        "kind": "decode", "shape": shape.name, "batch": batch, "context": context, "programs": work.num_programs,
        "us": round(seconds * 1e6, 2), "gb_s": round(work.kv_bytes / seconds / 1e9, 1),
        "of_limit": round(work.kv_bytes / seconds / limit, 3),
    }  # fmt: skip
    if ways.before:
        result["before_us"] = round(Attention(shape, batch, context, 1, 1, device, True).seconds() * 1e6, 2)
    if work.kv_bytes * work.copies <= COMPARED_BYTES:
        result["sdpa_us"] = round(work.sdpa_seconds() * 1e6, 2)
    return result


def verify(shape: ModelShape, batch: int, context: int, device: torch.device, ways: Ways) -> dict[str, Any]:
    """8 rows a sequence against 1, each in tiles of its own size, and 1 row in the tiles of 8."""

    def timed(is_before: bool) -> tuple[float, ...]:
        sizes = ((8, 8), (1, 1), (1, 8))
        return tuple(Attention(shape, batch, context, n, rows, device, is_before).seconds() for n, rows in sizes)

    rows, one, wide = timed(False)
    result = {
        "kind": "verify", "shape": shape.name, "batch": batch, "context": context, "us_8_rows": round(rows * 1e6, 2),
        "us_1_row": round(one * 1e6, 2), "us_1_row_in_tiles_of_8": round(wide * 1e6, 2), "ratio": round(rows / one, 3),
    }  # fmt: skip
    if ways.before:
        rows, one, _ = timed(True)
        result |= {"before_us_8_rows": round(rows * 1e6, 2), "before_us_1_row": round(one * 1e6, 2)}
    return result


def prefill(shape: ModelShape, rows: int, context: int, device: torch.device, ways: Ways) -> dict[str, Any]:
    """Two products of 2 D operations a query head and visible key."""
    group = shape.num_heads // shape.num_kv_heads
    heads = (group, shape.head_dim, shape.num_kv_heads)
    chosen = largest_tile_rows(rows, *heads, num_sms_of(device), shared_bytes(device))
    operations = 4 * shape.head_dim * shape.num_heads * sum(range(context - rows + 1, context + 1))
    work = Attention(shape, 1, context, rows, chosen, device)
    seconds = work.seconds()
    result = {
        "kind": "prefill", "shape": shape.name, "rows": rows, "context": context, "tile_rows": chosen,
        "us": round(seconds * 1e6, 1), "tflop_s": round(operations / seconds / 1e12, 2),
    }  # fmt: skip

    def other(tile_rows: int, is_before: bool) -> float:
        seconds = Attention(shape, 1, context, rows, tile_rows, device, is_before).seconds()
        return round(operations / seconds / 1e12, 2)

    if ways.tile_rows:
        sizes = {MAX_BLOCK_M // group, MAX_BLOCK_M // 2 // group}
        result |= {f"tflop_s_tiles_of_{size}": other(size, False) for size in sorted(sizes - {chosen})}
    if ways.before:
        result["before_tflop_s"] = other(MAX_BLOCK_M // group, True)
    if rows == context:
        result["sdpa_tflop_s"] = round(operations / work.sdpa_seconds() / 1e12, 2)
    return result


def rows_of(shape: ModelShape, name: str, num_rows: int, limit: float, device: torch.device) -> dict[str, Any]:
    """A row-wise kernel at a model's sizes: bytes read and written over time."""
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    size = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim

    def normal(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=device).normal_()

    def build() -> tuple[Callable[[], object], int]:
        if name == "add_rms_norm":
            residual, h, out = normal(num_rows, hidden), normal(num_rows, hidden), normal(num_rows, hidden)
            weight = normal(hidden, dtype=torch.float32)
            return lambda: add_rms_norm_(residual, h, weight, 1e-5, out=out), 4 * h.nbytes
        if name == "gated_activation":
            gate_up, out = normal(num_rows, 2 * intermediate), normal(num_rows, intermediate)
            return lambda: gated_activation(gate_up, "silu", out), gate_up.nbytes + out.nbytes
        qkv, (cos, sin) = normal(num_rows, size), (normal(num_rows, shape.head_dim, dtype=torch.float32) for _ in "cs")
        slots = torch.randperm(num_rows, device=device)
        caches = [normal(num_rows, shape.num_kv_heads, shape.head_dim) for _ in "kv"]
        heads = (shape.num_heads, shape.num_kv_heads)
        moved = 2 * qkv.nbytes + caches[0].nbytes + cos.nbytes + sin.nbytes  # q, k in place; k, v to the caches
        return lambda: rope_store_(qkv, cos, sin, slots, *caches, *heads, None, None, 1e-5), moved

    call, moved = build()
    copies = max(1, min(MAX_COPIES, CACHE_BYTES // moved)) if device.type == "cuda" else 1
    seconds = seconds_per_call([call, *(build()[0] for _ in range(copies - 1))], device)
    return {
        "kind": name, "shape": shape.name, "rows": num_rows, "us": round(seconds * 1e6, 2),
        "gb_s": round(moved / seconds / 1e9, 1), "of_limit": round(moved / seconds / limit, 3),
    }  # fmt: skip


def plan(only: list[str], ways: Ways, is_dry: bool, limit: float, device: torch.device) -> list[Case]:
    """Cases of the kinds `only`, all if it is empty; most telling first."""
    kernels = ("add_rms_norm", "rope_store", "gated_activation")
    shapes = (TINY,) if is_dry else (LLAMA8B, SMOLLM2)
    decodes = [(2, 40)] if is_dry else DECODES
    num_rows = (2,) if is_dry else (8, 4096)
    prefills = ((20, 20), (20, 40)) if is_dry else ((2048, 2048), (2048, 8192), (512, 512))
    batch, context = (2, 40) if is_dry else (8, 4096)
    cases: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    cases += [
        ("decode", lambda s=s, b=b, c=c: decode(s, b, c, limit, device, ways)) for b, c in decodes[:1] for s in shapes
    ]
    cases += [("verify", lambda s=s: verify(s, batch, context, device, ways)) for s in shapes]
    cases += [
        ("rows", lambda s=s, k=k, n=n: rows_of(s, k, n, limit, device))
        for s in shapes
        for k in kernels
        for n in num_rows
    ]
    cases += [("prefill", lambda s=s, r=r, c=c: prefill(s, r, c, device, ways)) for r, c in prefills for s in shapes]
    cases += [
        ("decode", lambda s=s, b=b, c=c: decode(s, b, c, limit, device, ways)) for b, c in decodes[1:] for s in shapes
    ]
    return [case for kind, case in cases if not only or kind in only]


@click.command(help=__doc__.partition("\n")[0])
@click.option("--budget", "budget_s", default=50.0, show_default=True, help="No case is begun after so many seconds.")
@click.option("--only", default="", help="decode, verify, prefill, rows; separated by commas. Default: all.")
@click.option("--before", "is_before", is_flag=True, help="Attention as it was, too.")
@click.option("--tile-rows", "is_sized", is_flag=True, help="Prefill in tiles of other sizes, too.")
@click.option("--dry-run", "is_dry", is_flag=True, help="Tiny sizes on the CPU under Triton's interpreter.")
@torch.inference_mode()
def main(budget_s: float, only: str, is_before: bool, is_sized: bool, is_dry: bool) -> None:
    names = [name for name in only.split(",") if name]
    unknown = sorted(set(names) - {"decode", "verify", "prefill", "rows"})
    if unknown:
        raise click.UsageError(f"--only: {', '.join(unknown)} is none of decode, verify, prefill, rows")
    run_cases(
        "attention_kernels",
        lambda limit, device: plan(names, Ways(is_before, is_sized), is_dry, limit, device),
        budget_s,
        is_dry,
    )


if __name__ == "__main__":
    main()
