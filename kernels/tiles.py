"""Tiles: which consecutive rows of a step share an id (adapter slot, sequence or head slot), built on the device.

Semantics, for row_ids [T] and tile_rows: the segments are the maximal runs of equal neighbouring ids; each segment of
an id >= 0 is cut from its first row on into tiles of at most `tile_rows` rows, and tile j in row order is
    tiles[j] = (first row, end row, id)
Unused entries are (0, 0, -1). One launch without any host synchronisation: a captured CUDA graph rebuilds its tiles
from whatever stands in `row_ids` at replay. Owns the table's format; knows nothing of what an id means.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

BLOCKS_T = (64, 512, 2048, 8192)  # rows of a launch, padded: few binaries, each is compiled once, maybe while serving


def max_tiles(num_rows: int, tile_rows: int, max_segments: int) -> int:
    """How many tiles `num_rows` rows need at most, if at most `max_segments` segments have an id >= 0.

    A segment of n rows has at most (n + tile_rows - 1) / tile_rows tiles; a segment has a row at least.
    """
    return (num_rows + (tile_rows - 1) * min(max_segments, num_rows)) // tile_rows


def build_tiles_reference(row_ids: Sequence[int], tile_rows: int) -> list[tuple[int, int, int]]:
    """The definition, written to be read: the used entries (first row, end row, id), in order."""
    tiles: list[tuple[int, int, int]] = []
    for row, row_id in enumerate(row_ids):
        if row_id < 0:
            continue
        first, end, last_id = tiles[-1] if tiles else (0, 0, -1)
        if end == row and last_id == row_id and row - first < tile_rows:
            tiles[-1] = (first, row + 1, row_id)
        else:
            tiles.append((row, row + 1, row_id))
    return tiles


def build_tiles_(tiles: torch.Tensor, row_ids: torch.Tensor, tile_rows: int) -> None:
    """Fill `tiles` [max_tiles, 3] int32 from `row_ids` [T] int32 (-1 = none), T up to 8192; both contiguous.

    The caller sizes `tiles` by `max_tiles`: tiles beyond the table are dropped, nothing is written outside it. CPU
    tensors work under Triton's interpreter.
    """
    assert tiles.dtype == row_ids.dtype == torch.int32, (tiles.dtype, row_ids.dtype)
    assert tiles.is_contiguous() and tiles.shape[1:] == (3,) and row_ids.is_contiguous(), (tiles.shape, row_ids.shape)
    num_rows = row_ids.shape[0]
    assert num_rows <= BLOCKS_T[-1], num_rows  # one program scans all rows
    if tiles.shape[0] == 0:
        return
    from .tiles_triton import build_tiles

    block_t = next(block for block in BLOCKS_T if num_rows <= block)
    build_tiles[(1,)](
        tiles, row_ids, num_rows, tiles.shape[0], tile_rows,
        BLOCK_T=block_t, BLOCK_TILES=min(block_t, 1024), num_warps=4 if block_t <= 1024 else 16,
    )  # fmt: skip
