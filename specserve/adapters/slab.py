"""An adapter's weights in one piece of memory of their own, which goes back to the system when the adapter goes.

Hundreds of tensors of 10 KB to some MB that come and go on reading threads leave the allocator's heaps in pieces: pages
with a live tensor beside free ones are never returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..kernels.huge_pages import map_memory
from ..kernels.lora import LoraPair

_ALIGNMENT = 64  # bytes, as torch's own allocator has it


def in_one_slab(pairs: Sequence[LoraPair]) -> list[LoraPair]:
    """Copies of `pairs` on the CPU, equal in shape, dtype and values, contiguous, in one anonymous mapping."""
    tensors = [tensor for pair in pairs for tensor in (pair.a, pair.b)]
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    if not sum(sizes):
        return list(pairs)
    slab, copies, offset = map_memory(sum(sizes)), [], 0
    for tensor, size in zip(tensors, sizes, strict=True):
        copy = slab[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(copy.copy_(tensor))
        offset += size
    return [LoraPair(copies[2 * i], copies[2 * i + 1], pair.scale) for i, pair in enumerate(pairs)]


def copied(pairs: Sequence[LoraPair], copy: Callable[[torch.Tensor], torch.Tensor]) -> list[LoraPair]:
    """`pairs` of one slab where `copy` puts that: one copy, whatever their number."""
    if not pairs:
        return []
    storage = pairs[0].a.untyped_storage()
    start, slab = storage.data_ptr(), copy(torch.empty(0, dtype=torch.uint8).set_(storage))

    def there(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.untyped_storage().data_ptr() == start and tensor.is_contiguous()
        offset = tensor.data_ptr() - start
        return slab[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    return [LoraPair(there(pair.a), there(pair.b), pair.scale) for pair in pairs]
