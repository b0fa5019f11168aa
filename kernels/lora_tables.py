"""Device tables of where each adapter slot's LoRA weights lie, for all fused linears of a model at once.

Owns one int64 tensor [slots, columns + 1, 4], allocated once: a column is a module of a fused linear of a layer, a
record is (address of A, address of B, rank, scale as fp32 bits), rank 0 where an adapter does not target the module;
the last column says how many blocks of ranks the slot's widest module has. An adapter that joins or leaves writes one
slot, one small asynchronous copy; addresses of the tables never change, so launches that a CUDA graph holds stay valid.
Adapters keep their own tensors and true ranks. Owns also the references that keep them alive, and the layout that
kernels may assume: A and B start at multiples of 16 bytes, a row of B has its rank rounded up to 8 elements. Tensors
that lie otherwise (ranks like 3 or 20) are copied when their slot is set.

Stream order: slots are set on the stream that runs the steps, so a step before it reads the old record and a step
after it the new one; that stream must also be the one whose allocator the weights came from.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch

from .lora import LoraPair

RECORD_SIZE = 4  # int64s: 32 bytes, one sector of a GPU's memory
BLOCK_R = 16  # ranks of a block of h; the smallest K of a tensor core's product in Triton
ROW_MULTIPLE = 8  # elements of a row of B: 16 bytes at 16 bits
MAX_MODULES = 3  # of a fused linear: q, k, v


@dataclass(frozen=True, slots=True)
class LoraShape:
    """A fused linear: x [T, in_size] to y [T, sum(out_sizes)], one LoRA module an out size."""

    in_size: int
    out_sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LoraEntry:
    """One fused linear's part of the tables, as launches take it. M modules."""

    records: torch.Tensor  # [slots, M, 4] int64, a view with the tables' slot stride
    shape: LoraShape
    num_rank_blocks: int  # of BLOCK_R, of the largest rank that a slot may have
    dtype: torch.dtype  # of the weights, and of the x that meets them

    @property
    def num_modules(self) -> int:
        return len(self.shape.out_sizes)


class LoraTables:
    """Addresses of the weights of up to `capacity` adapters in the fused linears `shapes`."""

    def __init__(
        self,
        shapes: Mapping[Hashable, LoraShape],
        capacity: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self.capacity, self.max_rank, self.dtype, self.device = capacity, max_rank, dtype, torch.device(device)
        self.shapes = dict(shapes)
        self._first_column: dict[Hashable, int] = {}
        num_columns = 0
        for key, shape in self.shapes.items():
            assert 1 <= len(shape.out_sizes) <= MAX_MODULES, shape
            self._first_column[key] = num_columns
            num_columns += len(shape.out_sizes)
        self._num_columns = num_columns
        # One column more: how many blocks of ranks the slot's widest module has.
        self.records = torch.zeros(capacity, num_columns + 1, RECORD_SIZE, dtype=torch.int64, device=self.device)
        self._kept: list[list[LoraPair]] = [[] for _ in range(capacity)]  # what the records of a slot point into
        self._entries = {key: self._make_entry(key) for key in self.shapes}

    def entry(self, key: Hashable) -> LoraEntry:
        """The launches' view of fused linear `key`; valid as long as the tables are."""
        return self._entries[key]

    @property
    def ranks_column(self) -> int:
        """Where in a slot's records, in int64s, the number of its blocks of BLOCK_R ranks stands."""
        return self._num_columns * RECORD_SIZE

    def set_slot(self, slot: int, pairs: Mapping[Hashable, Sequence[LoraPair | None]]) -> None:
        """Make `slot` the adapter with `pairs[key][module]`; keys that are absent and modules of None are not targeted.

        Weights have the tables' dtype and device, A is [R, in] and B [out, R] with 1 <= R <= max_rank.
        """
        fields: list[int] = [0] * ((self._num_columns + 1) * RECORD_SIZE)
        kept: list[LoraPair] = []
        for key, modules in pairs.items():
            shape = self.shapes[key]
            for module, (pair, out_size) in enumerate(zip(modules, shape.out_sizes, strict=True)):
                if pair is None:
                    continue
                rank = pair.a.shape[0]
                assert pair.a.shape == (rank, shape.in_size) and pair.b.shape == (out_size, rank), (key, module)
                assert 1 <= rank <= self.max_rank and pair.a.dtype == pair.b.dtype == self.dtype, (key, rank)
                assert pair.a.device.type == pair.b.device.type == self.device.type, (key, pair.a.device)
                pair = _laid_out(pair)
                kept.append(pair)
                start = (self._first_column[key] + module) * RECORD_SIZE
                scale_bits = struct.unpack("<I", struct.pack("<f", pair.scale))[0]
                fields[start : start + RECORD_SIZE] = pair.a.data_ptr(), pair.b.data_ptr(), rank, scale_bits
                fields[self.ranks_column] = max(fields[self.ranks_column], -(-rank // BLOCK_R))
        self._write(slot, fields)
        self._kept[slot] = kept

    def clear_slot(self, slot: int) -> None:
        """Make `slot` an adapter that targets nothing, and let go of its weights."""
        self._write(slot, [0] * ((self._num_columns + 1) * RECORD_SIZE))
        self._kept[slot] = []

    def _write(self, slot: int, fields: list[int]) -> None:
        record = torch.tensor(fields, dtype=torch.int64).view(self._num_columns + 1, RECORD_SIZE)
        if self.device.type == "cuda":
            record = record.pin_memory()  # torch's allocator keeps it until the copy that reads it is done
        self.records[slot].copy_(record, non_blocking=True)

    def _make_entry(self, key: Hashable) -> LoraEntry:
        shape, first = self.shapes[key], self._first_column[key]
        records = self.records[:, first : first + len(shape.out_sizes)]
        return LoraEntry(records, shape, -(-self.max_rank // BLOCK_R), self.dtype)


def _laid_out(pair: LoraPair) -> LoraPair:
    """`pair` with A contiguous, the rows of B contiguous and padded with zeros, both aligned; itself if it is so."""
    a, b = pair.a, pair.b
    if not a.is_contiguous() or a.data_ptr() % 16:
        a = a.clone(memory_format=torch.contiguous_format)
    rank = b.shape[1]
    if rank % ROW_MULTIPLE or not b.is_contiguous() or b.data_ptr() % 16:
        padded = b.new_zeros(b.shape[0], -(-rank // ROW_MULTIPLE) * ROW_MULTIPLE)
        padded[:, :rank] = b
        b = padded
    assert a.data_ptr() % 16 == b.data_ptr() % 16 == 0  # torch's allocators align by 64 bytes and more
    return LoraPair(a, b, pair.scale)
