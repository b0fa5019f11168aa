"""build_tiles_ under Triton's interpreter against its reference; test_under_triton.py runs it as a process."""

from __future__ import annotations

import random

import pytest
import torch
import triton_interpreter  # noqa: F401  (before anything imports triton)

from specserve.kernels.tiles import build_tiles_, build_tiles_reference, max_tiles


def make_ids(num_rows: int, max_segment: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    ids: list[int] = []
    while len(ids) < num_rows:
        ids += [rng.choice((-1, 0, 1, 2, 300))] * rng.randint(1, max_segment)
    return ids[:num_rows]


def build(ids: list[int], tile_rows: int, num_tiles: int) -> list[tuple[int, ...]]:
    tiles = torch.full((num_tiles + 1, 3), 77, dtype=torch.int32)
    build_tiles_(tiles[:num_tiles], torch.tensor(ids, dtype=torch.int32), tile_rows)
    assert (tiles[num_tiles] == 77).all(), "written outside the table"
    return [tuple(tile) for tile in tiles[:num_tiles].tolist()]


@pytest.mark.parametrize("tile_rows", [1, 4, 16])
@pytest.mark.parametrize("num_rows, max_segment", [(0, 1), (1, 1), (16, 1), (17, 40), (64, 1), (100, 3), (700, 90)])
def test_tiles_equal_the_reference_and_fit_the_bound(tile_rows, num_rows, max_segment):
    for seed in range(3):
        ids = make_ids(num_rows, max_segment, seed)
        expected = build_tiles_reference(ids, tile_rows)
        num_segments = sum(own >= 0 and (row == 0 or ids[row - 1] != own) for row, own in enumerate(ids))
        capacity = max_tiles(num_rows, tile_rows, num_segments)
        assert len(expected) <= capacity <= -(-num_rows // tile_rows) + num_segments
        assert build(ids, tile_rows, capacity + 3) == expected + [(0, 0, -1)] * (capacity + 3 - len(expected))


@pytest.mark.parametrize("tile_rows", [1, 3, 16])
def test_the_bound_on_tiles_is_tight(tile_rows):
    ids = [segment % 2 for segment in range(5) for _ in range(2 * tile_rows + 1)]
    assert len(build_tiles_reference(ids, tile_rows)) == max_tiles(len(ids), tile_rows, 5)


def test_rows_without_id_are_in_no_tile():
    assert build([-1] * 20, 4, 5) == [(0, 0, -1)] * 5
    assert build([-1, 7, -1, 7, 7], 4, 3) == [(1, 2, 7), (3, 5, 7), (0, 0, -1)]


def test_tiles_beyond_the_table_are_dropped_and_nothing_else_is_written():
    assert build([0, 1, 2, 3, 4], 16, 3) == [(0, 1, 0), (1, 2, 1), (2, 3, 2)]
