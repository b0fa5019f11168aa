"""Random LoRA batches for the kernel tests: odd shapes, mixed ranks, untargeted modules, skewed adapter popularity."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from specserve.kernels.lora_stack import LoraPair, LoraStack
from specserve.kernels.segments import Segments

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
    ranks: Sequence[Sequence[int | None]], dtype: torch.dtype, device: str = "cpu"
) -> list[list[LoraPair | None]]:
    torch.manual_seed(0)
    return [
        [
            None
            if rank is None
            else LoraPair(
                (torch.randn(rank, IN_SIZE) / IN_SIZE**0.5).to(device, dtype),
                (torch.randn(out_size, rank) / rank**0.5).to(device, dtype),
                0.25 * (1 + slot),
            )
            for rank, out_size in zip(modules, OUT_SIZES, strict=True)
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
    device: str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor, LoraStack, Segments]:
    """x [T, in], y [T, sum(out)], the stack and the segments; max_segment 1 gives one row a segment."""
    stack = LoraStack(make_slots(ranks, dtype, device), OUT_SIZES)
    runs = make_runs(popularity, len(ranks), num_segments, max_segment)
    segments = Segments.build(runs, len(ranks), device)
    x = torch.randn(segments.num_rows, IN_SIZE).to(device, dtype)
    y = torch.randn(segments.num_rows, sum(OUT_SIZES)).to(device, dtype)
    return x, y, stack, segments


def row_slots_of(segments: Segments) -> list[int]:
    lens = [end - start for start, end in zip(segments.starts, segments.starts[1:], strict=False)]
    return [slot for slot, n in zip(segments.slots, lens, strict=True) for _ in range(n)]
