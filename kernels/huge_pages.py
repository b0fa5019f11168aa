"""Memory for weights and the KV cache in pages of 2 MiB, where the operating system has them.

A step reads all weights once, and with pages of 4 KiB the CPU's prefetchers stop at each: a step of one row took 1.25
times as long. Long contexts take 1.1 times as long. Memory lives as long as any tensor in it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch

_PAGE = 2 << 20
_CHUNK = 64 << 20  # reserved at a time; what is not used takes no memory
_ALIGNMENT = 64  # bytes of a cache line


class HugePages:
    """Hands out tensors, one behind the other: a matrix that is smaller than a page shares it with others."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor [*shape] with any content."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._used + num_bytes > self._chunk.shape[0]:
            self._chunk, self._used = _reserve(max(num_bytes, _CHUNK)), 0
        piece = self._chunk[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return piece.view(dtype).view(*shape)


def map_memory(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8, a mapping of its own that goes with its last tensor; in large pages where whole ones fit."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # kernels without them, and other systems
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)  # holds the memory


def _reserve(num_bytes: int) -> torch.Tensor:
    """[num_bytes, rounded up to whole pages] uint8, from a page's start."""
    num_bytes = -(-num_bytes // _PAGE) * _PAGE
    whole = map_memory(num_bytes + _PAGE)
    start = -whole.data_ptr() % _PAGE
    return whole[start : start + num_bytes]
