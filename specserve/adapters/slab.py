"""An adapter's weights in one piece of memory of their own, which goes back to the system when the adapter goes.

Hundreds of tensors of 10 KB to some MB that come and go on reading threads leave the allocator's heaps in pieces: pages
with a live tensor beside free ones are never returned.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch

from ..kernels.lora import LoraPair

_ALIGNMENT = 64  # bytes, as torch's own allocator has it


def in_one_slab(pairs: Sequence[LoraPair]) -> list[LoraPair]:
    """Copies of `pairs` on the CPU, equal in shape, dtype and values, contiguous, in one anonymous mapping."""
    tensors = [tensor for pair in pairs for tensor in (pair.a, pair.b)]
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    if not sum(sizes):
        return list(pairs)
    mapping = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, AttributeError):  # systems without pages of 2 MiB, which prefetchers like
        mapping.madvise(mmap.MADV_HUGEPAGE)
    slab = torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping
    copies, offset = [], 0
    for tensor, size in zip(tensors, sizes, strict=True):
        copy = slab[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(copy.copy_(tensor))
        offset += size
    return [LoraPair(copies[2 * i], copies[2 * i + 1], pair.scale) for i, pair in enumerate(pairs)]
