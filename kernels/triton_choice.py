"""Whether a forward kernel launches Triton or runs its plain torch path: by device, read at each call.

CUDA launches Triton. CPU tensors take the torch path, except under Triton's interpreter (TRITON_INTERPRET=1), where
they go through the kernels, so that whatever is built on them can be checked without a GPU.
"""

from __future__ import annotations

import os

import torch


def launches_triton(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
