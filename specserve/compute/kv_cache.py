"""The KV cache's tensors; which block belongs to whom is `block_manager`'s business."""

from __future__ import annotations

import math

import torch

from ..kernels.huge_pages import map_memory


class KVCache:
    """Keys and values of `num_blocks` blocks, allocated once; `k[layer]` and `v[layer]` are [KV positions, Hkv, D]."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.block_size = block_size
        shape = (2, num_layers, num_blocks * block_size, num_kv_heads, head_dim)
        # Not cleared: no position is read before it is written, and clearing would make all of it resident (torch.zeros
        # maps 1025 MiB for 1 GiB) where an unused cache on the CPU costs address space only.
        if device.type == "cpu":
            pool = map_memory(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
        else:
            pool = torch.empty(shape, dtype=dtype, device=device)
        self.k = list(pool[0].unbind(0))
        self.v = list(pool[1].unbind(0))
