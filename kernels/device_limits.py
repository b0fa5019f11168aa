"""What a device lets a program have, and which devices the Triton kernels are for.

Sizes of blocks were chosen for H100s and H200s, whose programs may have 227 KiB of shared memory; so may a B200's. An
A100's have 163 KiB, in which all fit but linear_rows.py's, and those of cards for inference and workstations (A10, L4,
L40S, RTX 30 to 50) 99 KiB, for which attention has others (ragged_attention.py). tests/triton compiles them for each.
"""

from __future__ import annotations

import functools

import torch

FIRST_CAPABILITY = (8, 0)  # before, Triton has no matrix instructions and copies nothing ahead of its use
MOST_SHARED = 227 << 10  # bytes; Triton's interpreter, on CPUs, has as many
AMPLE_SHARED = 163 << 10  # of an A100
_LEAST_SHARED = 99 << 10


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """The most shared memory that a program on `device` may have."""
    if device.type != "cuda":
        return MOST_SHARED
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", _LEAST_SHARED)  # torch's types do not know it
