"""Whether attention's tiles of different sizes sum alike on the device, so that a row's bits do not follow its tile.

Small tiles are multiplied by other instructions than large ones, whose sums of the same numbers in the same order are
the same on the cards that were tried. Where they are not, `--exact` cannot be kept. Checked once, at start, on numbers
of the model's shapes: a decode's tile, and the two sizes that prompts have.
"""

from __future__ import annotations

import torch

from ...kernels.device_limits import shared_bytes
from ...kernels.ragged_attention import MIN_SPLIT_LEN, largest_tile_rows, ragged_attention_
from ...model.config import ModelConfig

_NUM_ROWS = 48
_CONTEXT = 400  # tokens: in two splits
_BLOCK_SIZE = 16
_MANY = 1 << 16  # rows of a step, for the largest tiles that any has


def tiles_that_differ(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> list[int]:
    """Rows a tile with which rows have other bits than with one row a tile; all of them in `dtype`."""
    group = config.num_heads // config.num_kv_heads
    generator = torch.Generator(device).manual_seed(0)

    def normal(num_rows: int, num_heads: int) -> torch.Tensor:
        size = (num_rows, num_heads, config.head_dim)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    q, (k, v) = normal(_NUM_ROWS, config.num_heads), (normal(_CONTEXT, config.num_kv_heads) for _ in "kv")
    positions = torch.arange(_CONTEXT - _NUM_ROWS, _CONTEXT, device=device)
    table = torch.arange(_CONTEXT // _BLOCK_SIZE, dtype=torch.int32, device=device)[None]

    def attended(tile_rows: int) -> torch.Tensor:
        firsts = range(0, _NUM_ROWS, tile_rows)
        tiles = [(first, min(first + tile_rows, _NUM_ROWS), 0) for first in firsts]
        out = torch.empty(_NUM_ROWS, config.num_heads * config.head_dim, dtype=dtype, device=device)
        ragged_attention_(
            out, q, k, v, torch.tensor(tiles, dtype=torch.int32, device=device), positions, table, None,
            block_size=_BLOCK_SIZE, scale=config.attention_scale, window=None, split_len=MIN_SPLIT_LEN,
            num_programs=1, tile_rows=tile_rows, softcap=config.attention_softcap,
        )  # fmt: skip
        return out

    one, shape = attended(1), (group, config.head_dim, config.num_kv_heads)
    sizes = {largest_tile_rows(num_rows, *shape, 1, shared_bytes(device)) for num_rows in (1, _MANY)} - {1}
    return [rows for rows in sorted(sizes) if not torch.equal(attended(rows), one)]  # sync: at start
