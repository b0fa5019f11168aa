"""Checks of ragged paged attention against its definition, on any device and path; run as elementwise_cases.py is.

A scene is a list of (rows, context) sequences. Blocks lie shuffled, unwritten slots are NaN, q is a view of a fused
qkv, two rows at the end are padding, and unused tiles follow the used ones.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from specserve.kernels.ragged_attention import (
    attention_scratch,
    longest_range,
    ragged_attention_,
    ragged_attention_reference,
    split_len_for,
)

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SCALE = 0.3
NUM_PADDED = 2
CASES = {
    "one decode": [(1, 9)],
    "first token": [(1, 1)],
    "decodes of skewed lengths": [(1, 1), (1, 700), (1, 64), (1, 65), (1, 256), (1, 257)],
    "a prompt": [(37, 37)],
    "mixed": [(4, 130), (1, 17), (37, 301), (0, 50), (1, 600), (5, 5), (8, 264)],
}


@dataclass
class Scene:
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    tiles: torch.Tensor
    positions: torch.Tensor
    block_tables: torch.Tensor
    block_size: int
    tile_rows: int
    max_context: int

    def run(
        self, window: int | None, num_splits: int, split_len: int | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """out [T, Hq * D], NaN where nothing was written."""
        device, shape = self.q.device, self.q.shape
        if out is None:
            out = torch.full((shape[0], shape[1] * shape[2]), torch.nan, device=device, dtype=self.q.dtype)
        max_keys = longest_range(self.max_context, window, self.tile_rows)
        length = split_len or split_len_for(max_keys, num_splits)
        scratch = attention_scratch(num_splits, shape[0] + 3, shape[1], shape[2], device)  # at capacity, as in use
        if scratch is not None:
            for buffer in scratch:
                buffer.fill_(torch.nan)
        ragged_attention_(
            out, self.q, self.k_cache, self.v_cache, self.tiles, self.positions, self.block_tables,
            torch.tensor([length], dtype=torch.int32, device=device), scratch, block_size=self.block_size, scale=SCALE,
            window=window, num_splits=num_splits, tile_rows=self.tile_rows,
        )  # fmt: skip
        return out

    def expected(self, window: int | None) -> torch.Tensor:
        tensors = (self.q, self.k_cache, self.v_cache, self.tiles, self.positions, self.block_tables)
        return ragged_attention_reference(
            *(t.cpu() for t in tensors), block_size=self.block_size, scale=SCALE, window=window
        )


def make_scene(
    case: list[tuple[int, int]],
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    tile_rows: int = 8,
    block_size: int = 16,
    seed: int = 0,
) -> Scene:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(seed)
    num_blocks = sum(-(-context // block_size) for _, context in case) + 3
    free = list(range(1, num_blocks))  # block 0 is what padding of a table names: it stays NaN
    random.Random(seed).shuffle(free)
    shape = (num_blocks * block_size, num_kv_heads, head_dim)
    k_cache, v_cache = (torch.full(shape, torch.nan, dtype=dtype) for _ in "kv")
    block_tables = torch.zeros(len(case), max(-(-c // block_size) for _, c in case) + 2, dtype=torch.int32)
    num_rows = sum(rows for rows, _ in case)
    tiles, positions, row = [], [], 0
    for sequence, (rows, context) in enumerate(case):
        for idx in range(-(-context // block_size)):
            block_tables[sequence, idx] = free.pop()
        keys = torch.arange(context)
        slots = block_tables[sequence][keys // block_size].long() * block_size + keys % block_size
        for cache in (k_cache, v_cache):
            cache[slots] = torch.randn(context, num_kv_heads, head_dim, generator=generator).to(dtype)
        positions += range(context - rows, context)
        tiles += [(at, min(at + tile_rows, row + rows), sequence) for at in range(row, row + rows, tile_rows)]
        row += rows
    tiles += [(0, 1, -1), (1 << 30, 1 << 30, -1)]
    positions += [0] * NUM_PADDED
    qkv = torch.randn(num_rows + NUM_PADDED, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    qkv[num_rows:] = torch.nan
    return Scene(
        qkv.to(device)[:, :num_heads],
        k_cache.to(device),
        v_cache.to(device),
        torch.tensor(tiles, dtype=torch.int32, device=device),
        torch.tensor(positions, device=device),
        block_tables.to(device),
        block_size,
        tile_rows,
        max(context for _, context in case),
    )


def close(out: torch.Tensor, expected: torch.Tensor) -> None:
    dtype = out.dtype
    assert out[-NUM_PADDED:].isnan().all(), "a padded row was written"
    torch.testing.assert_close(
        out[:-NUM_PADDED].cpu().float(), expected[:-NUM_PADDED], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def check(scene: Scene, window: int | None, splits: tuple[int, ...] = (1,), split_len: int | None = None) -> None:
    expected = scene.expected(window)
    for num_splits in splits:
        close(scene.run(window, num_splits, split_len), expected)


def check_same_row_alone(dtype: torch.dtype, heads: tuple[int, int, int], window: int | None, device: str) -> None:
    """A row's bits, in a verification of 5 rows within a mixed batch and as a decode of its own: one split each."""
    rows, context = 5, 390
    mixed = make_scene([(37, 50), (rows, context), (1, 200)], heads, dtype, device)
    together = mixed.run(window, 1)
    for idx in range(rows):
        row = 37 + idx
        single = Scene(
            mixed.q[row : row + 1], mixed.k_cache, mixed.v_cache,
            torch.tensor([[0, 1, 1]], dtype=torch.int32, device=device), mixed.positions[row : row + 1],
            mixed.block_tables, mixed.block_size, mixed.tile_rows, context,
        )  # fmt: skip
        assert torch.equal(single.run(window, 1)[0], together[row])


def check_other_tables(num_splits: int, device: str) -> None:
    """One launch, captured in a graph on CUDA, serves other rows, contexts, blocks and split lengths in its buffers."""
    num_rows, num_heads, num_kv_heads, head_dim = 20, 9, 3, 64
    scenes = [
        make_scene(case, (num_heads, num_kv_heads, head_dim), torch.bfloat16, device, seed=seed)
        for seed, case in enumerate([[(8, 300), (1, 40), (1, 500), (4, 20)], [(1, 700), (8, 60), (2, 2), (3, 90)]])
    ]
    num_slots = max(len(scene.k_cache) for scene in scenes)
    width = max(scene.block_tables.shape[1] for scene in scenes)
    shapes = {"tiles": (8, 3), "positions": (num_rows,), "block_tables": (4, width)}
    shapes |= {"q": (num_rows, num_heads, head_dim)}
    shapes |= dict.fromkeys(("k_cache", "v_cache"), (num_slots, num_kv_heads, head_dim))
    buffers = {
        name: torch.zeros(shape, dtype=getattr(scenes[0], name).dtype, device=device) for name, shape in shapes.items()
    }
    split_len = torch.zeros(1, dtype=torch.int32, device=device)
    scratch = attention_scratch(num_splits, num_rows, num_heads, head_dim, device)
    out = torch.empty(num_rows, num_heads * head_dim, dtype=torch.bfloat16, device=device)

    def fill(scene: Scene) -> None:
        for name, buffer in buffers.items():
            buffer.fill_(-1)
            value = getattr(scene, name)
            buffer[tuple(slice(size) for size in value.shape)] = value
        split_len.fill_(split_len_for(scene.max_context, num_splits))
        out.fill_(torch.nan)

    def check_out(scene: Scene) -> None:
        close(out[: len(scene.q)], scene.expected(None))
        assert out[len(scene.q) :].isnan().all()

    def launch() -> None:
        tensors = (buffers[name] for name in ("q", "k_cache", "v_cache", "tiles", "positions", "block_tables"))
        ragged_attention_(
            out, *tensors, split_len, scratch, block_size=16, scale=SCALE, window=None, num_splits=num_splits,
            tile_rows=8,
        )  # fmt: skip

    fill(scenes[0])
    launch()  # compiles before the capture
    check_out(scenes[0])
    replay = launch
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        replay = graph.replay
    for scene in (scenes[1], scenes[0]):
        fill(scene)
        replay()
        check_out(scene)
