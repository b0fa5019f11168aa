"""Inputs of captured CUDA graphs: one page of device memory that the host fills with one copy a step.

A `Layout` says where fields of given dtypes and lengths lie in a page; every graph bucket has its own layout over the
same `Page`, so that a small step copies few bytes and a captured graph keeps reading the addresses that it was captured
with. The host side is pinned on CUDA, and there are two of it, which take turns: a step is filled in while the copy of
the one before it still waits for the device. Each is handed out for writing only when its last copy has been made.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

_ALIGN = 64  # bytes; a multiple of what vector loads want


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Offsets of the fields of one bucket. Pages keep the views of each, so a bucket's is to be made once."""

    fields: dict[str, tuple[int, int, torch.dtype]]  # name -> (offset in bytes, elements, dtype)
    num_bytes: int

    @classmethod
    def of(cls, sizes: Mapping[str, tuple[int, torch.dtype]]) -> Layout:
        """A layout of `sizes`, name -> (elements, dtype)."""
        fields, offset = {}, 0
        for name, (length, dtype) in sizes.items():
            fields[name] = (offset, length, dtype)
            offset += -(-length * dtype.itemsize // _ALIGN) * _ALIGN
        return cls(fields, offset)

    def views(self, page: torch.Tensor) -> dict[str, torch.Tensor]:
        """Each field's part of `page` [num_bytes] uint8."""
        return {
            name: page[offset : offset + length * dtype.itemsize].view(dtype)
            for name, (offset, length, dtype) in self.fields.items()
        }


class Fence:
    """Behind the latest copy from or to a host's memory; on a CPU a copy is made when it is asked for."""

    def __init__(self, device: torch.device):
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def record(self) -> None:
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()


class HostPage:
    """`num_bytes` on the host that are copied to or from one page of `device`, pinned on CUDA."""

    def __init__(self, num_bytes: int, device: torch.device):
        self._bytes = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._fence = Fence(device)
        self._fields: dict[Layout, dict[str, np.ndarray]] = {}
        self._pairs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # first bytes here and of a page, by number

    def fields(self, layout: Layout) -> dict[str, np.ndarray]:
        """Views to fill or to read, by field, once the latest copy is done."""
        self._fence.wait()
        fields = self._fields.get(layout)
        if fields is None:
            fields = {name: view.numpy() for name, view in layout.views(self._bytes).items()}
            self._fields[layout] = fields
        return fields

    def copy_to(self, page: torch.Tensor, num_bytes: int) -> None:
        """Copy the first bytes to `page` uint8, in stream order."""
        here, there = self._first(page, num_bytes)
        there.copy_(here, non_blocking=True)
        self._fence.record()

    def copy_from(self, page: torch.Tensor, num_bytes: int) -> None:
        """Copy the first bytes of `page` uint8, in stream order."""
        here, there = self._first(page, num_bytes)
        here.copy_(there, non_blocking=True)
        self._fence.record()

    def _first(self, page: torch.Tensor, num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self._pairs.get(num_bytes)
        if pair is None:
            pair = self._pairs[num_bytes] = self._bytes[:num_bytes], page[:num_bytes]
        return pair


class Page:
    """`num_bytes` on the device and two times as many on the host."""

    def __init__(self, num_bytes: int, device: torch.device):
        self._hosts = [HostPage(num_bytes, device) for _ in range(2)]
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._views: dict[Layout, dict[str, torch.Tensor]] = {}

    def host(self, layout: Layout) -> dict[str, np.ndarray]:
        """Views to fill, by field, for the next upload."""
        self._hosts.reverse()
        return self._hosts[0].fields(layout)

    def device(self, layout: Layout) -> dict[str, torch.Tensor]:
        """Views that kernels read, by field; the same addresses on every call."""
        views = self._views.get(layout)
        if views is None:
            views = self._views[layout] = layout.views(self._device)
        return views

    def upload(self, layout: Layout) -> None:
        """Copy the layout's bytes, which `host` gave, to the device, in stream order."""
        self._hosts[0].copy_to(self._device, layout.num_bytes)


class Writer:
    """Writes entries of tables on the device, in stream order, behind one copy of up to 65,536 of them.

    The next but one copy waits until that one is done.
    """

    _MOST = 1 << 16

    def __init__(self, device: torch.device):
        self._page = Page(_entries(self._MOST).num_bytes, device)

    def __call__(self, writes: Iterable[tuple[torch.Tensor, np.ndarray, np.ndarray]]) -> None:
        """table.view(-1)[index] = values, of each; tables are int32 and contiguous, `index` int64, no place twice."""
        waiting: list[tuple[torch.Tensor, np.ndarray, np.ndarray]] = []
        room = self._MOST
        for table, index, values in writes:
            start = 0
            while start < len(index):
                if not room:
                    self._write(waiting)
                    waiting, room = [], self._MOST
                some = slice(start, start + room)
                waiting.append((table.view(-1), index[some], values[some]))
                start, room = start + room, room - len(waiting[-1][1])
        if waiting:
            self._write(waiting)

    def _write(self, writes: list[tuple[torch.Tensor, np.ndarray, np.ndarray]]) -> None:
        num = sum(len(index) for _, index, _ in writes)
        layout = _entries(max(16, 1 << (num - 1).bit_length()))
        host, fields, start = self._page.host(layout), self._page.device(layout), 0
        for _, index, values in writes:
            host["index"][start : start + len(index)], host["value"][start : start + len(index)] = index, values
            start += len(index)
        self._page.upload(layout)
        start = 0
        for flat, index, _ in writes:
            own = slice(start, start + len(index))
            flat.index_copy_(0, fields["index"][own], fields["value"][own])
            start += len(index)


@functools.cache
def _entries(num: int) -> Layout:
    return Layout.of({"index": (num, torch.int64), "value": (num, torch.int32)})
