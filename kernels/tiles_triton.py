"""The Triton kernel of tiles.py: one program, three scans over all rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["num_rows", "num_tiles", "tile_rows"])
def build_tiles(tiles, row_ids, num_rows, num_tiles, tile_rows, BLOCK_T: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """Grid (1,). A tile's first row writes its first row and id, its last row writes its end."""
    row = tl.arange(0, BLOCK_T)
    in_range = row < num_rows
    own = tl.load(row_ids + row, mask=in_range, other=-1)
    before = tl.load(row_ids + row - 1, mask=in_range & (row > 0), other=-1)
    after = tl.load(row_ids + row + 1, mask=row + 1 < num_rows, other=-1)
    has_id = own >= 0
    starts_segment = has_id & ((row == 0) | (own != before))
    segment_start = tl.associative_scan(tl.where(starts_segment, row, 0), 0, _larger)
    offset = row - segment_start
    is_first = has_id & (offset % tile_rows == 0)
    is_last = has_id & ((offset % tile_rows == tile_rows - 1) | (own != after))
    count = tl.cumsum(is_first.to(tl.int32), 0)
    entry = tiles + (count - 1) * 3
    fits = count <= num_tiles
    tl.store(entry, row, mask=is_first & fits)
    tl.store(entry + 1, row + 1, mask=is_last & fits)
    tl.store(entry + 2, own, mask=is_first & fits)
    num_used = tl.sum(is_first.to(tl.int32), 0)
    for start in range(0, num_tiles, BLOCK_TILES):
        index = start + tl.arange(0, BLOCK_TILES)
        unused = (index >= num_used) & (index < num_tiles)
        tl.store(tiles + index * 3, 0, mask=unused)
        tl.store(tiles + index * 3 + 1, 0, mask=unused)
        tl.store(tiles + index * 3 + 2, -1, mask=unused)
