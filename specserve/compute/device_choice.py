"""Decides, once at start, where the model runs and the sizes that nobody set, which follow from that."""

from __future__ import annotations

import os

import msgspec
import torch

from ..config import EngineConfig
from ..errors import UserError

# (CPU, CUDA). A GPU's step of 2,048 rows takes as long as a CPU's of some tens.
_DEFAULTS = {"max_num_seqs": (64, 256), "max_batched_tokens": (512, 2048), "max_prefill_rows": (128, 1024)}
_CPU_KV_GIB = 2.0
_CUDA_KV_SHARE = (
    0.8  # of the memory that is free once the model is loaded; activations, graphs and adapters get the rest
)


def choose_device(config: EngineConfig) -> torch.device:
    """Raises `UserError` where CUDA is asked for and there is none."""
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise UserError("device=cuda needs a CUDA GPU that torch can use; set it to auto or cpu", param="device")
    automatic = "cuda" if has_cuda else "cpu"
    return torch.device(automatic if config.device == "auto" else config.device)


def with_defaults(config: EngineConfig, device: torch.device) -> EngineConfig:
    """`config` with every size set but that of the KV cache, which waits for the model."""
    is_cuda = device.type == "cuda"
    missing = {name: values[is_cuda] for name, values in _DEFAULTS.items() if getattr(config, name) is None}
    return msgspec.structs.replace(config, **missing)


def kv_cache_gib(config: EngineConfig, device: torch.device) -> float:
    """GiB for the KV cache; call it when the model is loaded."""
    if config.kv_cache_gib is not None:
        return config.kv_cache_gib
    if device.type != "cuda":
        return _CPU_KV_GIB
    free, _ = torch.cuda.mem_get_info(device)
    return free / 2**30 * _CUDA_KV_SHARE


def memory_bytes(device: torch.device) -> int:
    """All memory that the device has, in use or not."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
