"""LoRA on the device: one shrink and one expand launch over a list of blocks, all modules of a fused linear in each.

Semantics, for rows s..e with adapter slot a and every module m of a fused linear:
    y[s:e, columns(m)] += scale_{a,m} * (x[s:e] @ A_{a,m}^T) @ B_{a,m}^T
An entry of the list is a tile of at most `tile_rows` rows of one adapter and one block of 16 of its ranks:
    (first row, end row, slot, block, number of blocks)
It is made on the device once a step, from the rows' slots and the slots' ranks, so true ranks cost what they have and a
step of few adapters has few entries. Prefill, verification (SGMV) and decode (BGMV) run the same programs (the names
are punica's, arXiv:2310.18547). Modules that an adapter does not target and rows without adapter are not touched.
Sums are fp32 in an order that shapes and rank alone fix, no atomics; `tile_rows` follows from the number of rows and
changes no sum. A launch can be captured in a CUDA graph and replayed with other slots and other weights in them.

Launches overlap (dependent_launch.py): see the kernels. They read the list before they wait for the launch in front, so
between what builds it and a `lora_add_` lies a launch that does not begin early, such as torch's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .dependent_launch import dependent_launch
from .lora_tables import BLOCK_R, LoraEntry, LoraTables
from .tiles import BLOCKS_T, max_tiles

_WIDTH = 5  # int32s of an entry
_PIECE = 256  # columns of y of an item of expand's
WIDE_R = 64  # ranks at once of adapters that have more than one block


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes of grids, by the sm_90 binaries for 132 SMs: what one wave holds, programs take several items after that.

    Shrink: 16 ranks by 512 inputs are 16 KB of A in a program of 4 warps, of which an SM holds 4: 64 KB in flight,
    where 25 hide the latency of 4.8 TB/s. Expand: 8 KB of B in a program of 2 warps, 8 an SM, as much.
    """

    shrink_programs: int = 4 * 132
    expand_programs: int = 8 * 132
    expand_registers: int = 128  # a thread, for 8 programs an SM; left alone the compiler takes 243, for 4
    # (most inputs, chunk of K that a split has)
    chunks: tuple[tuple[int, int], ...] = ((1024, 256), (4096, 512), (8192, 1024))
    largest_chunk: int = 2048
    largest_chunk_fp32: int = 1024  # 96 KiB of shared memory, in which the other fits at 16 bits
    wide_chunk: int = 2048  # from here on a program has 8 warps, each a part of the chunk; else 4
    small_rows: int = 128  # up to so many rows tiles have 8, one instruction's width; beyond 16


SIZES = _Sizes()


def split_k(in_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """(number of splits, chunk) of a shrink over `in_size` inputs; of no batch, which so changes no sum."""
    largest = SIZES.largest_chunk_fp32 if dtype == torch.float32 else SIZES.largest_chunk
    chunk = next((chunk for most, chunk in SIZES.chunks if in_size <= most), largest)
    return -(-in_size // chunk), chunk


def parts_of(chunk: int) -> int:
    """Into how many parts, one a warp, shrink cuts a chunk."""
    return 8 if chunk >= SIZES.wide_chunk else 4


def _block_splits(splits: int) -> int:
    return 1 << (splits - 1).bit_length()


def tile_rows_of(num_rows: int, dtype: torch.dtype) -> int:
    """Rows of a tile in a step of `num_rows`, which reads an adapter's weights once; 16 of fp32 would not fit an SM."""
    return 8 if num_rows <= SIZES.small_rows or dtype == torch.float32 else 16


def max_blocks(num_rows: int, max_segments: int, tables: LoraTables) -> int:
    """How many entries the list of `num_rows` rows of at most `max_segments` runs of one adapter has at most."""
    return max_tiles(num_rows, tile_rows_of(num_rows, tables.dtype), max_segments) * -(-tables.max_rank // BLOCK_R)


def new_blocks(num_blocks: int, device: torch.device | str) -> torch.Tensor:
    """A list of up to `num_blocks` entries, [1 + num_blocks, 5] int32, empty; its first word is their number."""
    return torch.zeros(1 + num_blocks, _WIDTH, dtype=torch.int32, device=device)


def scratch_size(entry: LoraEntry, num_rows: int, *, is_embedding: bool = False) -> int:
    """fp32 elements of scratch that a launch over `num_rows` rows needs."""
    splits = 1 if is_embedding else split_k(entry.shape.in_size, entry.dtype)[0]
    return num_rows * entry.num_modules * entry.num_rank_blocks * BLOCK_R * _block_splits(splits)


def list_blocks_reference(row_slots: list[int], ranks: list[int], tile_rows: int) -> list[tuple[int, ...]]:
    """The definition, written to be read: entries in order; `ranks[slot]` is the largest rank of the slot's modules."""
    entries: list[tuple[int, ...]] = []
    first = 0
    for row, slot in enumerate(row_slots):
        if row == 0 or slot != row_slots[row - 1] or row - first == tile_rows:
            first = row
        is_last = row + 1 == len(row_slots) or row_slots[row + 1] != slot or row + 1 - first == tile_rows
        if slot >= 0 and is_last:
            num_blocks = -(-ranks[slot] // BLOCK_R)
            entries += [(first, row + 1, slot, block, num_blocks) for block in range(num_blocks)]
    return entries


def list_blocks_(blocks: torch.Tensor, row_slots: torch.Tensor, tables: LoraTables) -> None:
    """Fill `blocks` (`new_blocks`) for rows of the slots `row_slots` [T] int32 (-1 = none), T up to 8192.

    The caller sizes it by `max_blocks`: entries beyond are dropped. CPU tensors work under Triton's interpreter.
    """
    assert blocks.dtype == row_slots.dtype == torch.int32, (blocks.dtype, row_slots.dtype)
    assert blocks.is_contiguous() and blocks.shape[1] == _WIDTH and row_slots.is_contiguous(), blocks.shape
    num_rows = row_slots.shape[0]
    assert num_rows <= BLOCKS_T[-1], num_rows  # one program scans all rows
    from .lora_blocks_triton import list_blocks

    block_t = next(block for block in BLOCKS_T if num_rows <= block)
    records = tables.records
    list_blocks[(1,)](
        blocks, row_slots, records, records.stride(0), tables.ranks_column, num_rows, blocks.shape[0] - 1,
        tile_rows_of(num_rows, tables.dtype), BLOCK_T=block_t, num_warps=4 if block_t <= 1024 else 16,
    )  # fmt: skip


def lora_add_(y: torch.Tensor, x: torch.Tensor, entry: LoraEntry, blocks: torch.Tensor, scratch: torch.Tensor) -> None:
    """Add to each row of y [T, sum(out)] its adapter's LoRA of the same row of x [T, in], in place.

    Rows are contiguous; x has the weights' dtype, y any of fp32, bf16, fp16. `blocks` are those of these T rows
    (`list_blocks_`); `scratch` is contiguous fp32 of at least `scratch_size(entry, T)`.
    """
    assert x.shape[0] == y.shape[0] and x.shape[1] == entry.shape.in_size, (x.shape, y.shape)  # else reads astray
    assert x.stride(1) == 1 and x.dtype == entry.dtype, (x.stride(), x.dtype, entry.dtype)
    _check(y, entry, blocks, scratch, scratch_size(entry, x.shape[0]))
    if x.shape[0] == 0 or blocks.shape[0] == 1:
        return
    from .lora_blocks_triton import lora_shrink

    splits, chunk = split_k(entry.shape.in_size, entry.dtype)
    num_items = (blocks.shape[0] - 1) * entry.num_modules * splits
    lora_shrink[(min(num_items, SIZES.shrink_programs),)](
        scratch, x, entry.records, blocks, entry.records.stride(0), x.shape[1], x.stride(0),
        entry.num_rank_blocks * BLOCK_R,
        NUM_MODULES=entry.num_modules, SPLITS=splits, BLOCK_SPLITS=_block_splits(splits),
        CHUNK=chunk, PARTS=parts_of(chunk), TILE_ROWS=tile_rows_of(x.shape[0], x.dtype), BLOCK_R=BLOCK_R,
        num_warps=parts_of(chunk), **_options(x.device),
    )  # fmt: skip
    _expand_(y, entry, blocks, scratch, splits)


def lora_embedding_add_(
    y: torch.Tensor, tokens: torch.Tensor, entry: LoraEntry, blocks: torch.Tensor, scratch: torch.Tensor
) -> None:
    """Add to each row of y [T, H] its adapter's LoRA of the embedding of `tokens` [T] (int32 or int64), in place.

    `entry` has in_size V and one module; the rest is as in `lora_add_`, the scratch of `is_embedding=True`.
    """
    assert tokens.shape == y.shape[:1] and tokens.is_contiguous() and entry.num_modules == 1, (tokens.shape, y.shape)
    _check(y, entry, blocks, scratch, scratch_size(entry, tokens.shape[0], is_embedding=True))
    if tokens.shape[0] == 0 or blocks.shape[0] == 1:
        return
    from .lora_blocks_triton import lora_gather

    lora_gather[(min(blocks.shape[0] - 1, SIZES.shrink_programs),)](
        scratch, tokens, entry.records, blocks, entry.records.stride(0), entry.shape.in_size,
        entry.num_rank_blocks * BLOCK_R,
        DTYPE=_triton_dtype(entry.dtype), TILE_ROWS=tile_rows_of(y.shape[0], entry.dtype), BLOCK_R=BLOCK_R, num_warps=2,
    )  # fmt: skip
    _expand_(y, entry, blocks, scratch, splits=1)


def _expand_(y: torch.Tensor, entry: LoraEntry, blocks: torch.Tensor, scratch: torch.Tensor, splits: int) -> None:
    from .lora_blocks_triton import lora_expand

    out_0, out_1, out_2 = (*entry.shape.out_sizes, 0, 0)[:3]
    tile_rows = tile_rows_of(y.shape[0], entry.dtype)
    num_items = (blocks.shape[0] - 1) * sum(-(-out_size // _PIECE) for out_size in entry.shape.out_sizes)
    lora_expand[(min(num_items, SIZES.expand_programs),)](
        y, scratch, entry.records, blocks, entry.records.stride(0), y.stride(0), entry.num_rank_blocks * BLOCK_R,
        out_0, out_1, out_2,
        NUM_MODULES=entry.num_modules, SPLITS=splits, BLOCK_SPLITS=_block_splits(splits),
        DTYPE=_triton_dtype(entry.dtype), TILE_ROWS=tile_rows, WIDE_R=WIDE_R, num_warps=2, num_stages=1,
        **_options(y.device, SIZES.expand_registers if tile_rows == 8 else None),
    )  # fmt: skip


def _options(device: torch.device, registers: int | None = None) -> dict[str, Any]:
    """Of a launch: overlap with the one in front, where the device can; most registers a thread."""
    limit = {} if registers is None or device.type != "cuda" else {"maxnreg": registers}
    return limit | dependent_launch(device)


def _check(y: torch.Tensor, entry: LoraEntry, blocks: torch.Tensor, scratch: torch.Tensor, needed: int) -> None:
    assert y.shape[1] == sum(entry.shape.out_sizes) and y.stride(1) == 1, (y.shape, y.stride(), entry.shape)
    assert blocks.dtype == torch.int32 and blocks.is_contiguous() and blocks.shape[1] == _WIDTH, blocks.shape
    assert scratch.dtype == torch.float32 and scratch.is_contiguous(), (scratch.dtype, scratch.stride())
    assert scratch.numel() >= needed, (scratch.numel(), needed)


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
