"""An adapter's weights in one piece of memory of their own, which goes back to the system when the adapter goes.

Hundreds of tensors of 10 KB to some MB that come and go on reading threads leave the allocator's heaps in pieces: pages
with a live tensor beside free ones are never returned. Layers that have the same modules are laid out together, each in
a row of its own, so that a layer's tensors lie side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ..kernels.huge_pages import map_memory
from ..kernels.lora import Empty, LoraPair

_ALIGNMENT = 64  # bytes, as torch's own allocator has it


def as_in_peft(pair: LoraPair, empty: Empty) -> LoraPair:
    """A contiguous copy in what `empty(shape, dtype)` gives."""
    a, b = (empty(tuple(tensor.shape), dtype=tensor.dtype).copy_(tensor) for tensor in (pair.a, pair.b))
    return LoraPair(a, b, pair.scale)


class Slab:
    """Memory of `num_bytes`, zeros, of which each tensor gets the next piece."""

    def __init__(self, num_bytes: int):
        self._bytes = map_memory(max(num_bytes, _ALIGNMENT))
        self._used = 0

    def empty(self, size: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of this shape; raises `ValueError` when there is no room for it."""
        num_bytes = math.prod(size) * dtype.itemsize
        if self._used + num_bytes > self._bytes.shape[0]:
            raise ValueError(f"{num_bytes} bytes more than {self._used} of {self._bytes.shape[0]}")
        piece = self._bytes[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return piece.view(dtype).view(size)

    def rows(self, num: int, num_bytes: int) -> Rows:
        """The next `num` rows of `num_bytes` each."""
        return Rows(self.empty((num, -(-num_bytes // _ALIGNMENT) * _ALIGNMENT), dtype=torch.uint8))


class Rows:
    """Rows of equal layout, [N, bytes]."""

    def __init__(self, memory: torch.Tensor):
        self._memory = memory
        self._used = 0  # of each row

    def empty(self, size: tuple[int, ...], *, dtype: torch.dtype) -> torch.Tensor:
        """[N, ...]: a contiguous tensor of each row; raises `ValueError` when there is no room for it."""
        num_bytes = math.prod(size[1:]) * dtype.itemsize
        if self._used + num_bytes > self._memory.shape[1]:
            raise ValueError(f"{num_bytes} bytes more than {self._used} of {self._memory.shape[1]}")
        piece = self._memory[:, self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return piece.view(dtype).view(size)


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
