"""LoRA on the device: one shrink and one expand launch over tiles of rows, all modules of a fused linear in each.

Semantics, for a tile of rows s..e with adapter slot a and every module m of a fused linear:
    y[s:e, columns(m)] += scale_{a,m} * (x[s:e] @ A_{a,m}^T) @ B_{a,m}^T
Tiles of several rows are SGMV (prefill, verification), tiles of one row BGMV (decode); both run the same program, which
is why a row has the same bits in either (the names are punica's, arXiv:2310.18547). True ranks; modules that an adapter
does not target and rows without adapter are not touched. fp32 sums in an order that shapes and rank alone fix, no
atomics. Nothing here depends on which adapters there are: a launch can be captured in a CUDA graph and replayed with
other tiles and other weights in the slots. Owns the block sizes; the weights' addresses are lora_tables.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .lora_tables import BLOCK_R, LoraEntry

TILE_ROWS = 16  # the smallest M of tl.dot: a tile of one row costs no less
_MAX_SPLITS = 16


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Block sizes, by a roofline for an H200 and the sm_90 binaries; what an H100 made of them: docs/performance.md.

    132 SMs and 4.8 TB/s: about 25 KB in flight an SM hide 700 ns of latency. The case is 64 rows of 64 adapters, in
    and out 4096, rank 16, 64 KB of A and as much of B an SM.
    Shrink: chunks of 512 make 8 x 64 programs, all at once (25 KB of shared memory each, so up to 8 an SM). Each reads
    16 KB of A in 4 steps of 4 KB, of which the pipeline holds 3 in flight: 48 KB an SM with 4 programs. 16 ranks by
    16 rows are two instructions wide, so more than 2 warps would only repeat each other's products.
    Expand: 128 columns by 16 ranks are 4 KB of B; 122 registers allow 4 programs an SM with 2 steps in flight, 32 KB.
    A program pays a chain of three loads (tile, record, weights) before its first product, so it takes up to 8 blocks
    of columns one after the other, but no more than leave 4 programs for every SM: few tiles are spread widely.
    """

    shrink_chunk: int = 512  # of K, a split; longer where the splits would be more than _MAX_SPLITS
    shrink_block_k: int = 128
    shrink_warps: int = 2
    shrink_stages: int = 4
    expand_block_n: int = 128
    expand_max_blocks: int = 8  # of columns, a program
    expand_programs: int = 4 * 132  # what one wave holds
    expand_warps: int = 4
    expand_stages: int = 3


SIZES = _Sizes()


def split_k(in_size: int) -> tuple[int, int]:
    """(number of splits, chunk) of a shrink over `in_size` inputs; of nothing else, so that no batch changes a sum."""
    block = SIZES.shrink_block_k
    chunk = max(SIZES.shrink_chunk, -(-in_size // _MAX_SPLITS))
    chunk = -(-chunk // block) * block
    return -(-in_size // chunk), chunk


def scratch_size(entry: LoraEntry, num_rows: int, *, is_embedding: bool = False) -> int:
    """fp32 elements of scratch that a launch over `num_rows` rows needs."""
    splits = 1 if is_embedding else split_k(entry.shape.in_size)[0]
    return num_rows * entry.num_modules * entry.num_rank_blocks * splits * BLOCK_R


def lora_add_(y: torch.Tensor, x: torch.Tensor, entry: LoraEntry, tiles: torch.Tensor, scratch: torch.Tensor) -> None:
    """Add to each row of y [T, sum(out)] its adapter's LoRA of the same row of x [T, in], in place.

    Rows are contiguous; x has the weights' dtype, y any of fp32, bf16, fp16. `tiles` [max_tiles, 3] int32 of at most
    TILE_ROWS rows (tiles.py), all within T; `scratch` is contiguous fp32 of at least `scratch_size(entry, T)`.
    """
    assert x.shape[0] == y.shape[0] and x.shape[1] == entry.shape.in_size, (x.shape, y.shape)  # else reads astray
    assert x.stride(1) == 1 and x.dtype == entry.dtype, (x.stride(), x.dtype, entry.dtype)
    _check(y, entry, tiles, scratch, scratch_size(entry, x.shape[0]))
    if x.shape[0] == 0 or tiles.shape[0] == 0:
        return
    from .lora_tiles_triton import lora_shrink

    splits, chunk = split_k(entry.shape.in_size)
    lora_shrink[(tiles.shape[0], entry.num_modules * splits)](
        scratch, x, entry.records, tiles, entry.records.stride(0), x.shape[1], x.stride(0), entry.num_rank_blocks,
        NUM_MODULES=entry.num_modules, SPLITS=splits, CHUNK=chunk,
        TILE_ROWS=TILE_ROWS, BLOCK_R=BLOCK_R, BLOCK_K=SIZES.shrink_block_k,
        num_warps=SIZES.shrink_warps, num_stages=SIZES.shrink_stages,
    )  # fmt: skip
    _expand_(y, entry, tiles, scratch, splits)


def lora_embedding_add_(
    y: torch.Tensor, tokens: torch.Tensor, entry: LoraEntry, tiles: torch.Tensor, scratch: torch.Tensor
) -> None:
    """Add to each row of y [T, H] its adapter's LoRA of the embedding of `tokens` [T] (int32 or int64), in place.

    `entry` has in_size V and one module; the rest is as in `lora_add_`, the scratch of `is_embedding=True`.
    """
    assert tokens.shape == y.shape[:1] and tokens.is_contiguous() and entry.num_modules == 1, (tokens.shape, y.shape)
    _check(y, entry, tiles, scratch, scratch_size(entry, tokens.shape[0], is_embedding=True))
    if tokens.shape[0] == 0 or tiles.shape[0] == 0:
        return
    from .lora_tiles_triton import lora_gather

    lora_gather[(tiles.shape[0],)](
        scratch, tokens, entry.records, tiles, entry.records.stride(0), entry.shape.in_size, entry.num_rank_blocks,
        DTYPE=_triton_dtype(entry.dtype), TILE_ROWS=TILE_ROWS, BLOCK_R=BLOCK_R, num_warps=2,
    )  # fmt: skip
    _expand_(y, entry, tiles, scratch, splits=1)


def _expand_(y: torch.Tensor, entry: LoraEntry, tiles: torch.Tensor, scratch: torch.Tensor, splits: int) -> None:
    import triton

    from .lora_tiles_triton import lora_expand

    block_n = SIZES.expand_block_n
    out_0, out_1, out_2 = (*entry.shape.out_sizes, 0, 0)[:3]
    # From the table's capacity, not its contents; columns are independent, so that this changes no bits.
    num_blocks = tiles.shape[0] * sum(-(-out_size // block_n) for out_size in entry.shape.out_sizes)
    blocks = min(SIZES.expand_max_blocks, triton.next_power_of_2(-(-num_blocks // SIZES.expand_programs)))
    num_pieces = sum(-(-out_size // (block_n * blocks)) for out_size in entry.shape.out_sizes)
    lora_expand[(tiles.shape[0], num_pieces)](
        y, scratch, entry.records, tiles, entry.records.stride(0), y.stride(0), entry.num_rank_blocks,
        out_0, out_1, out_2,
        NUM_MODULES=entry.num_modules, SPLITS=splits, BLOCK_SPLITS=triton.next_power_of_2(splits),
        DTYPE=_triton_dtype(entry.dtype),
        TILE_ROWS=TILE_ROWS, BLOCK_R=BLOCK_R, BLOCK_N=block_n, COLUMN_BLOCKS=blocks,
        num_warps=SIZES.expand_warps, num_stages=SIZES.expand_stages,
    )  # fmt: skip


def _check(y: torch.Tensor, entry: LoraEntry, tiles: torch.Tensor, scratch: torch.Tensor, needed: int) -> None:
    assert y.shape[1] == sum(entry.shape.out_sizes) and y.stride(1) == 1, (y.shape, y.stride(), entry.shape)
    assert tiles.dtype == torch.int32 and tiles.is_contiguous() and tiles.shape[1:] == (3,), (tiles.dtype, tiles.shape)
    assert scratch.dtype == torch.float32 and scratch.is_contiguous(), (scratch.dtype, scratch.stride())
    assert scratch.numel() >= needed, (scratch.numel(), needed)


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
