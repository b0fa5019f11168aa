"""The adapters of one step for the native forward: which rows use which weights, read where the adapters hold them.

The counterpart of `compute/torch/lora.py`. Nothing is stacked or copied: a step gets a table of addresses for
the adapters that it names, so that adapters come and go at no cost, whatever their number, ranks and modules. LoRA on
the embedding and the lm_head goes through torch row by row: a product of several rows would round by their number.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from ...adapters.lora import LoraAdapter
from ...kernels.lora import Empty, LoraPair
from ...kernels.native import PANEL, Lora
from ...model.config import ModelConfig
from ...model.shapes import LINEARS

_MAX_TABLES = 64


class NativeLoraBatch:
    """One step's view. `row_slots` [T], of 32 bits, is each row's place in the table, -1 without adapter."""

    def __init__(
        self, adapters: Sequence[LoraAdapter], row_slots: list[int], logits_slots: list[int], table: ctypes.Array
    ):
        self.row_slots = array("i", row_slots)
        self.has_embedding = any([adapter.embed is not None for adapter in adapters])
        self.has_lm_head = any([adapter.lm_head is not None for adapter in adapters])
        self.max_rank = max(adapter.max_rank for adapter in adapters)
        self.table_address = ctypes.addressof(table)
        self._adapters, self._table = adapters, table
        self._logits_slots = logits_slots

    def add_embedding_(self, tokens: torch.Tensor, y: torch.Tensor) -> None:
        """y [T, H] fp32 += LoRA of the embedding for tokens [T]."""
        for slot, adapter in enumerate(self._adapters):
            if adapter.embed is not None:
                a, b, scale = adapter.embed
                b = b.float()
                for row in _rows_with(slot, self.row_slots):
                    y[row] += (b @ a[:, tokens[row]].float()) * scale

    def add_lm_head_(self, x: torch.Tensor, logits: torch.Tensor) -> None:
        """logits [L, V] += LoRA of the lm_head for hidden rows x [L, H] fp32."""
        for slot, adapter in enumerate(self._adapters):
            if adapter.lm_head is not None:
                a, b, scale = adapter.lm_head
                a, b = a.float(), b.float()
                for row in _rows_with(slot, self._logits_slots):
                    logits[row] += (b @ (a @ x[row])) * scale


def _rows_with(slot: int, slots: Sequence[int]) -> list[int]:
    return [row for row, own in enumerate(slots) if own == slot]


class NativeSlots:
    """Tables of addresses of adapters; slot i of a step is the i-th adapter that it names."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        self._num_layers = config.num_layers
        self._dtype = dtype
        self._active: list[LoraAdapter] = []
        self._slot_of: dict[str, int] = {}
        # By content hashes; each with the adapters whose tensors it points into.
        self._tables: dict[tuple[str, ...], tuple[ctypes.Array, list[LoraAdapter]]] = {}
        self._parts: dict[str, tuple[ctypes.Array, LoraAdapter]] = {}  # of tables, each adapter's own

    def slot_of(self, content_hash: str) -> int:
        return self._slot_of[content_hash]

    def activate(self, active: Sequence[LoraAdapter]) -> None:
        """Give every adapter of `active` (no duplicates) a slot for the next batch."""
        self._active = list(active)
        self._slot_of = {adapter.content_hash: slot for slot, adapter in enumerate(active)}

    def free(self, content_hash: str) -> None:
        """Forget an adapter that was unloaded."""
        self._tables = {key: known for key, known in self._tables.items() if content_hash not in key}
        self._parts.pop(content_hash, None)
        self._active = [adapter for adapter in self._active if adapter.content_hash != content_hash]

    def batch(self, runs: Sequence[tuple[str | None, int]], logits_indices: Sequence[int]) -> NativeLoraBatch | None:
        """The step's view for `runs` of (content hash or None, rows), in row order; None without any adapter."""
        if all(content_hash is None for content_hash, _ in runs):
            return None
        row_slots: list[int] = []
        for content_hash, num_rows in runs:
            row_slots += [-1 if content_hash is None else self._slot_of[content_hash]] * num_rows
        key = tuple(adapter.content_hash for adapter in self._active)
        known = self._tables.get(key)
        if known is None or any(old is not new for old, new in zip(known[1], self._active, strict=True)):
            if len(self._tables) >= _MAX_TABLES:
                self._tables.clear()
            known = self._tables[key] = self._build(), self._active
        return NativeLoraBatch(self._active, row_slots, [row_slots[row] for row in logits_indices], known[0])

    def _build(self) -> ctypes.Array:
        """Every set of adapters that steps name has its own table: with many adapters, most requests a new one."""
        num = self._num_layers * len(LINEARS)
        table = (Lora * (len(self._active) * num))()
        for slot, adapter in enumerate(self._active):
            part, of = self._parts.get(adapter.content_hash, (None, None))
            if part is None or of is not adapter:
                part = self._part(adapter)
                self._parts[adapter.content_hash] = part, adapter
            size = ctypes.sizeof(part)
            ctypes.memmove(ctypes.addressof(table) + slot * size, part, size)
        return table

    def _part(self, adapter: LoraAdapter) -> ctypes.Array:
        part = (Lora * (self._num_layers * len(LINEARS)))()
        for (layer, module), pair in adapter.layers.items():
            a, b = pair.a, pair.b  # as `to_native` laid them out
            assert b.dim() == 3 and a.is_contiguous() and b.is_contiguous() and a.dtype == b.dtype == self._dtype
            part[layer * len(LINEARS) + LINEARS.index(module)] = Lora(
                a.data_ptr(), b.data_ptr(), b.shape[1], pair.scale
            )
        return part


def to_native(pair: LoraPair, empty: Empty = torch.empty) -> LoraPair:
    """A layer module's pair in the order in which the native kernels read it (kernels/cpu/lora.h), padded with zeros.

    A is flat, with each block of 8, 4 or 1 rows as [in / 32, rows, 32]; B is [panels, R, 64]. Both are copies, in what
    `empty(shape, dtype)` gives. Pairs of one shape may come together, [N, ...].
    """
    (*num, rank, size_in), out, dtype = pair.a.shape, pair.b.shape[-2], pair.a.dtype
    a, b = pair.a, pair.b
    if size_in % 32:
        a = F.pad(a, (0, -size_in % 32))
    panels = -(-out // PANEL)
    if out % PANEL:
        b = F.pad(b, (0, 0, 0, panels * PANEL - out))
    size, row = a.shape[-1], 0
    flat = empty((*num, rank * size), dtype=dtype)
    while row < rank:
        num_rows = next(num for num in (8, 4, 1) if row + num <= rank)
        block = flat[..., row * size : (row + num_rows) * size].unflatten(-1, (-1, num_rows, 32))
        _copy(block, a[..., row : row + num_rows, :].unflatten(-1, (-1, 32)).transpose(-3, -2))
        row += num_rows
    there = empty((*num, panels, rank, PANEL), dtype=dtype)
    _copy(there, b.unflatten(-2, (panels, PANEL)).transpose(-2, -1))
    return LoraPair(flat, there, pair.scale)


def _copy(there: torch.Tensor, values: torch.Tensor) -> None:
    """As `Tensor.copy_` between equal dtypes; numpy takes half the time to turn one over."""
    integers = {2: torch.int16, 4: torch.int32}[there.itemsize]
    np.copyto(there.view(integers).numpy(), values.view(integers).numpy())
