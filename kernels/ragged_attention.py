"""Paged attention of ragged queries by tiles of rows: prefill chunks, decodes and verifications in one launch.

Semantics, for row r of a tile (first, end, sequence) and its position p = positions[r], with window w:
    out[r] = softmax(scale * q[r] K^T) V over the sequence's cached positions max(0, p - w + 1) .. p
where with a softcap c each score s is c * tanh(s / c) before the softmax (Gemma 2, Gemma Team 2024).
Rows of a tile are consecutive and in order of position. Keys are cut into splits of `split_len`, split s from key
s * split_len on. Each has a softmax of its own, and a row's splits are joined in ascending order: by the one program
that has them all; where several share a tile's, by the last of them to arrive, or in tiles of many rows by a launch of
its own. So a row has the same bits in whichever tile it stands, whoever is beside it and however many programs there
are; `split_len` is the engine's, not the step's. Rows in no tile (padding) are not read, and their rows of out are left
as they were.
"""

from __future__ import annotations

import math

import torch

from .attention import attention_reference
from .dependent_launch import dependent_launch
from .device_limits import AMPLE_SHARED, MOST_SHARED, shared_bytes

MAX_BLOCK_M = 128  # rows of a tile times heads of a group, padded
MAX_HEAD_DIM = 256
_MOST_SMALL_M = 64  # BLOCK_M, and BLOCK_M * BLOCK_D, with which three stages fit 99 KiB of shared memory
_FIT_THREE = 64 * 128
MAX_SPLITS = 32  # of the longest context
MIN_SPLIT_LEN = 256  # below, a split's start and its partial result cost more than its keys
_SCRATCH_BYTES = 1 << 26  # a layer's partial results; steps of more rows have programs enough without
MOST_PLACES = (1 << 31) - 1  # of a tensor, for offsets of 32 bits
MOST_JOINED = 32  # rows and heads of tiles whose last program joins: 16 KiB a split; one multiprocessor reads 100 GB/s

# Keys a block, by bytes of a padded head row: a block of K and V is 32 KiB from 128 bytes on. 4.8 TB/s at about 1 us of
# latency want 36 KiB under way on each of 132 SMs: two programs an SM have two blocks each under way, and a third in
# use. Sizes are as compiled for sm_90; none of this has been timed. fp32 has no matrix instructions at full precision:
# it is for checks, so only small.
BLOCK_N = {16: 128, 32: 128, 64: 128, 128: 128, 256: 64, 512: 32, 1024: 16}


def block_parameters(
    tile_rows: int, group: int, head_dim: int, itemsize: int, most_shared: int = MOST_SHARED
) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCK_D, num_warps and num_stages of a launch, in at most `most_shared` bytes a program."""
    block_m = max(16, _power_of_two(tile_rows * group))
    block_d = max(16, _power_of_two(head_dim))
    if block_m > MAX_BLOCK_M or head_dim > MAX_HEAD_DIM or head_dim % 8:
        raise ValueError(
            f"tile_rows={tile_rows} with {group} query heads a KV head of {head_dim}: at most {MAX_BLOCK_M} rows and "
            f"heads together, and heads of a multiple of 8 up to {MAX_HEAD_DIM}; take smaller tiles"
        )
    is_half = itemsize == 2
    block_n = BLOCK_N[block_d * itemsize] if is_half else min(32, BLOCK_N[block_d * itemsize])
    # 4 warps are the one warp group that a matrix instruction of 64 rows needs; 128 rows are two of them. 8 also where
    # a row's sums, those of its split and those of all splits, would not fit the registers of 4.
    is_wide = block_m == 128 or block_m * block_d > 64 * 128
    if not is_half:
        is_wide |= block_m == 64 or block_m * block_d > 64 * 64
    if not is_half:
        num_stages = 2
    elif most_shared < AMPLE_SHARED:
        num_stages = 3 if block_m <= _MOST_SMALL_M and block_m * block_d <= _FIT_THREE else 2
    else:  # three blocks are held: products of 64 rows read them while they run, those of fewer copy them to registers
        num_stages = 4 if block_m < 64 else 3
    num_warps = 8 if is_wide else 4
    return dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=num_warps, num_stages=num_stages)


def largest_tile_rows(
    num_rows: int, group: int, head_dim: int, num_kv_heads: int, num_sms: int, most_shared: int = MOST_SHARED
) -> int:
    """Rows of the tiles of a step of `num_rows` rows whose sequences have many.

    128 rows and heads read K and V half as often as 64 do. 64 where their sums fill the registers, and where there
    are too few tiles for all multiprocessors: two programs then share one, and the shorter makes up for the longer.
    What leaves no room in `most_shared` bytes to read K and V ahead is smaller still.
    """
    block_d = _power_of_two(head_dim)
    num_programs = -(-num_rows // max(1, MAX_BLOCK_M // group)) * num_kv_heads
    most = MAX_BLOCK_M // 2 if block_d > 128 or 2 * num_programs < 3 * num_sms else MAX_BLOCK_M
    if most_shared < AMPLE_SHARED:
        most = min(_MOST_SMALL_M, _FIT_THREE // block_d)
    return max(1, (most if group <= most else MAX_BLOCK_M) // group)


def choose_split_len(max_model_len: int) -> int:
    """Keys a split, a power of two: `MAX_SPLITS` of them hold the longest context."""
    return max(MIN_SPLIT_LEN, _power_of_two(-(-max_model_len // MAX_SPLITS)))


def choose_programs(num_tiles: int, num_kv_heads: int, num_sms: int, row_bytes: int, num_rows: int) -> int:
    """Programs, 1 to `MAX_SPLITS`, that share a tile's splits: at most two on each of `num_sms` in all.

    Two keep the memory busy (BLOCK_N), and more than run at a time would wait for others to end. One where partial
    results of `num_rows` rows, each of `row_bytes` with all splits, would take too much memory.
    """
    if num_rows * row_bytes > _SCRATCH_BYTES:
        return 1
    return max(1, min(MAX_SPLITS, 2 * num_sms // max(1, num_tiles * num_kv_heads)))


def scratch_row_bytes(num_heads: int, head_dim: int) -> int:
    """Partial results of a row's heads in all splits, as `choose_programs` asks."""
    return MAX_SPLITS * num_heads * (head_dim + 2) * 4


def attention_scratch(
    num_rows: int, num_heads: int, head_dim: int, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Partial outputs [MAX_SPLITS, T, Hq, D] and (max, sum) [MAX_SPLITS, T, Hq, 2], float32.

    `num_rows` is the largest T: a launch with fewer rows uses the front of each split.
    """
    partial = torch.empty(MAX_SPLITS, num_rows, num_heads, head_dim, dtype=torch.float32, device=device)
    return partial, torch.empty(MAX_SPLITS, num_rows, num_heads, 2, dtype=torch.float32, device=device)


def ragged_attention_(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tiles: torch.Tensor,
    positions: torch.Tensor,
    block_tables: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor] | None,
    arrived: torch.Tensor | None = None,
    *,
    block_size: int,
    scale: float,
    window: int | None,
    split_len: int,
    num_programs: int,
    tile_rows: int,
    softcap: float | None = None,
) -> None:
    """Write attention's output of all rows that stand in a tile to out [T, Hq * D], contiguous.

    q [T, Hq, D], heads contiguous, rows at any stride (a view of the fused qkv); caches [KV positions, Hkv, D] of one
    stride in q's dtype; tiles [max_tiles, 3] int32 (first row, end row, sequence), sequence -1 unused; positions [T]
    int64; block_tables [S, N] int32; scratch of `attention_scratch`, not needed by one program a tile. `split_len` as
    `choose_split_len` has it, and no context of more than MAX_SPLITS of it where `num_programs` is above 1. With
    `arrived`, int32 zeros for each tile and KV head, which are left so, splits are joined without another launch.
    `scale` and `softcap` are positive. Tiles, positions and tables were written before a launch that did not begin
    early.
    """
    num_heads, head_dim, num_kv_heads = q.shape[1], q.shape[2], k_cache.shape[1]
    group = num_heads // num_kv_heads
    assert group * num_kv_heads == num_heads and k_cache.shape[2] == head_dim, (q.shape, k_cache.shape)
    from .ragged_attention_triton import join_splits_kernel, ragged_attention_kernel

    assert q.dtype == k_cache.dtype == v_cache.dtype, (q.dtype, k_cache.dtype, v_cache.dtype)
    assert q.stride()[1:] == (head_dim, 1) and out.is_contiguous() and out.numel() == q.numel(), (q.stride(), out.shape)
    assert k_cache.stride()[1:] == (head_dim, 1) and k_cache.stride() == v_cache.stride(), (k_cache.stride(),)
    assert tiles.is_contiguous() and positions.is_contiguous() and block_tables.stride(1) == 1
    assert max(q.shape[0] * q.stride(0), q.numel()) <= MOST_PLACES and scale > 0, (q.shape, q.stride(), scale)
    assert softcap is None or softcap > 0, softcap
    if tiles.shape[0] == 0:
        return
    partial, stats = out, out  # not touched by one program
    if num_programs > 1:
        assert scratch is not None
        partial, stats = scratch
        assert partial.shape[1] >= q.shape[0], (partial.shape, q.shape)
        assert partial.shape[2:] == q.shape[1:] and partial.is_contiguous() and stats.is_contiguous()
        assert stats.shape == (*partial.shape[:3], 2)
    is_shared = num_programs > 1  # not their number: one binary serves any
    joins = is_shared and arrived is not None
    assert arrived is None or arrived.numel() >= tiles.shape[0] * num_kv_heads, (arrived.shape, tiles.shape)
    blocks = block_parameters(tile_rows, group, head_dim, q.element_size(), shared_bytes(q.device))
    assert split_len % blocks["BLOCK_N"] == 0, (split_len, blocks["BLOCK_N"])
    shape = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "WINDOW": window or 0, "SPLIT_LEN": split_len}
    ragged_attention_kernel[(num_kv_heads, tiles.shape[0], num_programs)](
        out,
        partial,
        stats,
        arrived if joins else tiles,
        q,
        k_cache,
        v_cache,
        tiles,
        positions,
        block_tables,
        (softcap or scale) * math.log2(math.e),
        2.0 * scale / softcap * math.log2(math.e) if softcap else 0.0,
        q.stride(0),
        k_cache.stride(0),
        block_tables.stride(0),
        partial.stride(0),
        stats.stride(0),
        GROUP=group,
        BLOCK_SIZE=block_size,
        HAS_CAP=softcap is not None,
        IEEE=q.dtype == torch.float32,
        IS_WIDE=k_cache.shape[0] * k_cache.stride(0) > MOST_PLACES,
        IS_SHARED=is_shared,
        JOINS=joins,
        **shape,
        **blocks,
        **dependent_launch(out.device),
    )
    if is_shared and not joins:
        join_splits_kernel[(tiles.shape[0] * tile_rows, num_heads)](
            out,
            partial,
            stats,
            tiles,
            positions,
            partial.stride(0),
            stats.stride(0),
            tile_rows,
            BLOCK_D=blocks["BLOCK_D"],
            num_warps=1,
            **shape,
            **dependent_launch(out.device),
        )


def ragged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    tiles: torch.Tensor,
    positions: torch.Tensor,
    block_tables: torch.Tensor,
    *,
    block_size: int,
    scale: float,
    window: int | None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The definition in float32, tile by tile: [T, Hq * D], NaN in rows of no tile."""
    out = torch.full((q.shape[0], q.shape[1] * q.shape[2]), torch.nan)
    for first, end, sequence in tiles.tolist():
        if sequence >= 0:
            kv_positions = _kv_positions(block_tables[sequence], int(positions[end - 1]) + 1, block_size)
            k, v = k_cache[kv_positions], v_cache[kv_positions]  # [keys, Hkv, D]
            out[first:end] = attention_reference(q[first:end], k, v, int(positions[first]), scale, window, softcap)
    return out


def _kv_positions(table: torch.Tensor, num_keys: int, block_size: int) -> torch.Tensor:
    keys = torch.arange(num_keys, device=table.device)
    return table[keys // block_size].long() * block_size + keys % block_size


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
