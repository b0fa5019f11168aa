"""Tiles of rows with one id: built on the device exactly as the reference cuts them."""

from __future__ import annotations

import pytest
import torch
from triton_process import needs_triton

from specserve.kernels.tiles import build_tiles_, build_tiles_reference, max_tiles


def test_the_reference_cuts_segments_from_their_first_row():
    assert build_tiles_reference([5, 5, 5, -1, 5, 2, 2], 2) == [(0, 2, 5), (2, 3, 5), (4, 5, 5), (5, 7, 2)]
    assert build_tiles_reference([], 2) == []


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("num_rows", [1, 64, 1000, 8192])
def test_a_graph_rebuilds_its_tiles_from_the_ids_of_the_replay(num_rows):
    ids = torch.zeros(num_rows, dtype=torch.int32, device="cuda")
    tiles = torch.zeros(max_tiles(num_rows, 16, num_rows), 3, dtype=torch.int32, device="cuda")
    build_tiles_(tiles, ids, 16)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        build_tiles_(tiles, ids, 16)
    for max_segment in (1, 7, 100):
        runs = torch.randint(-1, 50, (num_rows,)).repeat_interleave(torch.randint(1, max_segment + 1, (num_rows,)))
        ids.copy_(runs[:num_rows])
        graph.replay()
        expected = build_tiles_reference(ids.tolist(), 16)
        num_unused = tiles.shape[0] - len(expected)
        assert [tuple(tile) for tile in tiles.tolist()] == expected + [(0, 0, -1)] * num_unused
