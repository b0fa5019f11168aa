"""Random LoRA batches for the kernel tests: odd shapes, mixed ranks, untargeted modules, skewed adapter popularity.

`make_case` is for the CPU's stacks, `TilesCase` for the device's tables, over the same runs and weights.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from specserve.kernels.lora_stack import LoraPair, LoraStack
from specserve.kernels.lora_tables import LoraShape, LoraTables
from specserve.kernels.lora_tiles import TILE_ROWS, lora_add_, lora_reference, scratch_size
from specserve.kernels.segments import Segments
from specserve.kernels.tiles import build_tiles_, max_tiles

IN_SIZE, OUT_SIZES = 70, (33, 17, 17)
POPULARITY = ("uniform", "zipf", "distinct", "identical", "none")
# One adapter a line: the ranks in the three modules. Two have equal ranks, so that they share a batched product.
RANKS: list[tuple[int | None, ...]] = [
    (8, 8, 8), (1, 3, 16), (8, 8, 8), (None, 64, None), (None, None, None), (16, None, 1), (8, 8, 8), (3, 3, 3),
]  # fmt: skip


def make_runs(popularity: str, num_slots: int, num_segments: int, max_segment: int) -> list[tuple[int, int]]:
    """(slot, rows) runs, some empty, some without adapter, one slot in several places; slots 6 and 7 stay unused."""
    rng = random.Random(f"{popularity} {num_segments} {max_segment}")
    used = min(num_slots, 6)
    slots = {
        "uniform": [rng.randrange(-1, used) for _ in range(num_segments)],
        "zipf": rng.choices(range(used), [1 / (s + 1) ** 2 for s in range(used)], k=num_segments),
        "distinct": rng.sample(range(used), min(used, num_segments)),
        "identical": [0] * num_segments,
        "none": [-1] * num_segments,
    }[popularity]
    return [(slot, rng.choice((0, 1, 1, rng.randint(1, max_segment)))) for slot in slots] + [(slots[0], 1)]


def make_slots(
    ranks: Sequence[Sequence[int | None]],
    dtype: torch.dtype,
    device: str = "cpu",
    in_size: int = IN_SIZE,
    out_sizes: tuple[int, ...] = OUT_SIZES,
) -> list[list[LoraPair | None]]:
    torch.manual_seed(0)
    return [
        [
            None
            if rank is None
            else LoraPair(
                (torch.randn(rank, in_size) / in_size**0.5).to(device, dtype),
                (torch.randn(out_size, rank) / rank**0.5).to(device, dtype),
                0.25 * (1 + slot),
            )
            for rank, out_size in zip(modules, out_sizes, strict=True)
        ]
        for slot, modules in enumerate(ranks)
    ]


def make_case(
    popularity: str,
    dtype: torch.dtype,
    *,
    max_segment: int,
    num_segments: int,
    ranks: Sequence[Sequence[int | None]] = RANKS,
) -> tuple[torch.Tensor, torch.Tensor, LoraStack, Segments]:
    """x [T, in], y [T, sum(out)], the stack and the segments; max_segment 1 gives one row a segment."""
    stack = LoraStack(make_slots(ranks, dtype), OUT_SIZES)
    runs = make_runs(popularity, len(ranks), num_segments, max_segment)
    segments = Segments.build(runs, len(ranks))
    x = torch.randn(segments.num_rows, IN_SIZE).to(dtype)
    y = torch.randn(segments.num_rows, sum(OUT_SIZES)).to(dtype)
    return x, y, stack, segments


def row_slots_of(segments: Segments) -> list[int]:
    lens = [end - start for start, end in zip(segments.starts, segments.starts[1:], strict=False)]
    return [slot for slot, n in zip(segments.slots, lens, strict=True) for _ in range(n)]


class TilesCase:
    """Rows, tables and scratch with fixed addresses, as a CUDA graph holds them; `run` launches over the row slots.

    Unused memory holds NaN, so that a kernel that reads what it must not is seen.
    """

    def __init__(
        self,
        slots: list[list[LoraPair | None]],
        num_rows: int,
        dtype: torch.dtype,
        *,
        in_size: int = IN_SIZE,
        out_sizes: tuple[int, ...] = OUT_SIZES,
        max_rank: int = 65,
        y_dtype: torch.dtype | None = None,
        device: str = "cpu",
    ):
        self.slots, self.out_sizes = slots, out_sizes
        self.tables = LoraTables({"group": LoraShape(in_size, out_sizes)}, len(slots) + 2, max_rank, dtype, device)
        for slot, modules in enumerate(slots):
            self.tables.set_slot(slot, {"group": modules})
        self.entry = self.tables.entry("group")
        self.row_slots = torch.full((num_rows,), -1, dtype=torch.int32, device=device)
        num_tiles = max_tiles(num_rows, TILE_ROWS, num_rows)
        self.tiles = torch.zeros(num_tiles, 3, dtype=torch.int32, device=device)
        self.scratch = torch.full((scratch_size(self.entry, num_rows),), float("nan"), device=device)
        self.x = torch.randn(num_rows, in_size).to(device, dtype)
        self.y = torch.randn(num_rows, sum(out_sizes)).to(device, y_dtype or dtype)

    def set_rows(self, row_slots: list[int]) -> None:
        """Slots of the first rows; the rest is padding."""
        padded = row_slots + [-1] * (len(self.row_slots) - len(row_slots))
        self.row_slots.copy_(torch.tensor(padded, dtype=torch.int32))

    def launch(self, y: torch.Tensor) -> None:
        build_tiles_(self.tiles, self.row_slots, TILE_ROWS)
        lora_add_(y, self.x, self.entry, self.tiles, self.scratch)

    def run(self) -> torch.Tensor:
        y = self.y.clone()
        self.launch(y)
        return y

    def reference(self) -> torch.Tensor:
        return lora_reference(self.y, self.x, self.slots, self.out_sizes, self.row_slots.tolist())
