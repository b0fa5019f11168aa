"""Inputs of captured CUDA graphs: one page of device memory that the host fills with one copy a step.

A `Layout` says where fields of given dtypes and lengths lie in a page; every graph bucket has its own layout over the
same `Page`, so that a small step copies few bytes and a captured graph keeps reading the addresses that it was captured
with. The host side is pinned on CUDA; it is handed out for writing only when its last copy has been made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

_ALIGN = 64  # bytes; a multiple of what vector loads want


@dataclass(frozen=True, slots=True)
class Layout:
    """Offsets of the fields of one bucket."""

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


class HostCopy:
    """`num_bytes` on the host that bytes of `device` are copied to, pinned on CUDA."""

    def __init__(self, num_bytes: int, device: torch.device):
        self._host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def queue(self, source: torch.Tensor) -> None:
        """Copy `source` [num_bytes] uint8, in stream order."""
        self._host.copy_(source, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def fields(self, layout: Layout) -> dict[str, np.ndarray]:
        """Views to read, by field, once the latest copy is done."""
        if self._copied is not None:
            self._copied.synchronize()
        return {name: view.numpy() for name, view in layout.views(self._host).items()}


class Page:
    """`num_bytes` on the host and as many on the device."""

    def __init__(self, num_bytes: int, device: torch.device):
        self._host = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def host(self, layout: Layout) -> dict[str, np.ndarray]:
        """Views to fill, by field, once the latest copy is done."""
        if self._copied is not None:
            self._copied.synchronize()  # sync: that copy was queued a step ago
        return {name: view.numpy() for name, view in layout.views(self._host).items()}

    def device(self, layout: Layout) -> dict[str, torch.Tensor]:
        """Views that kernels read, by field; the same addresses on every call."""
        return layout.views(self._device)

    def upload(self, layout: Layout) -> None:
        """Copy the layout's bytes to the device, in stream order."""
        self._device[: layout.num_bytes].copy_(self._host[: layout.num_bytes], non_blocking=True)
        self._record()

    def _record(self) -> None:
        if self._copied is not None:
            self._copied.record()
