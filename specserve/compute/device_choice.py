"""Decides, once at start, where the model runs and the sizes that nobody set, which follow from that."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import msgspec
import torch

from ..config import EngineConfig
from ..errors import UserError
from ..memory import available_bytes, physical_bytes
from ..model.config import ModelConfig
from .path import StepLimits

logger = logging.getLogger(__name__)

# (CPU, CUDA). A GPU's step of 2,048 rows takes as long as a CPU's of some tens.
_DEFAULTS = {
    "max_num_seqs": (64, 256),
    "max_batched_tokens": (512, 2048),
    "max_prefill_rows": (128, 1024),
    "max_adapters": (4096, 256),
}
_CPU_KV_GIB = 2.0
_MIN_ADAPTER_BYTES = 64 << 20  # where next to nothing is free
_ADAPTER_SHARE = 0.5  # of what is free beside the KV cache
# Of the memory that the model and the steps leave; adapters get the rest.
_CUDA_KV_SHARE = 0.8


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


def step_bytes(
    device: torch.device, model: ModelConfig, dtype: torch.dtype, limits: StepLimits, cuda_graphs: bool
) -> int:
    """Bytes of the device that steps will take beside weights, KV and adapters; on a CPU nothing to speak of."""
    if device.type != "cuda":
        return 0
    from .cuda import step_memory  # late: it is 0.4 s of a start on a CPU

    return step_memory.step_bytes(model, dtype, limits, cuda_graphs)


def kv_cache_gib(config: EngineConfig, device: torch.device, later_bytes: int = 0) -> float:
    """GiB for the KV cache; call it when the model is loaded. `later_bytes` is what `step_bytes` says.

    Raises `UserError` where these leave nothing.
    """
    if config.kv_cache_gib is not None:
        return config.kv_cache_gib
    if device.type != "cuda":
        return _CPU_KV_GIB
    torch.cuda.empty_cache()  # what loading let go of is free
    free, _ = torch.cuda.mem_get_info(device)
    if free <= later_bytes:
        raise UserError(
            f"the model leaves {free / 2**30:.1f} GiB of the GPU's memory, and steps of "
            f"max_batched_tokens={config.max_batched_tokens} rows may take {later_bytes / 2**30:.1f}; lower it "
            "(--max-batched-tokens), or set kv_cache_gib (--kv-cache-gib) to try all the same",
            param="max_batched_tokens",
        )
    return (free - later_bytes) / 2**30 * _CUDA_KV_SHARE


def full_device(error: Exception, config: EngineConfig) -> UserError | None:
    """What to say of a start that a GPU's full memory ended; None of other errors.

    torch has an error for it, CUDA and Triton only words.
    """
    said = str(error).partition("\n")[0]
    if not (isinstance(error, torch.OutOfMemoryError) or ("CUDA" in said and "out of memory" in said)):
        return None
    kv = "four fifths of what is free" if config.kv_cache_gib is None else f"{config.kv_cache_gib:g}"
    return UserError(
        f"the GPU's memory does not hold model, KV cache and steps ({said}); end what else uses it, or lower "
        f"kv_cache_gib (--kv-cache-gib, now {kv}) or max_batched_tokens (--max-batched-tokens)",
        param="kv_cache_gib",
    )


@dataclass(frozen=True, slots=True)
class AdapterBudgets:
    """Bytes for adapters: where steps read them, and in main memory beside that, if these are two."""

    step_bytes: int
    host_bytes: int | None
    step_flag: str  # that sets `step_bytes`


def adapter_budgets(config: EngineConfig, device: torch.device, later_bytes: int) -> AdapterBudgets:
    """The budgets of `config`, or shares of what is free now; call it when the KV cache is there.

    `later_bytes` are those of the device that are taken later: on a CPU the KV cache's, page by page as they are used,
    on CUDA what steps take. Raises `UserError` for what cannot be.
    """
    is_cuda = device.type == "cuda"
    if config.adapter_device_gib is not None and not is_cuda:
        raise UserError(
            f"adapter_device_gib={config.adapter_device_gib:g} is for CUDA; on a CPU adapters have one memory "
            "(--adapter-memory-gib)",
            param="adapter_device_gib",
        )
    free = available_bytes() if is_cuda else available_bytes() - later_bytes
    memory = _adapter_bytes(config.adapter_memory_gib, "adapter_memory_gib", free, memory_bytes(torch.device("cpu")))
    if not is_cuda:
        return AdapterBudgets(memory, None, "--adapter-memory-gib")
    free, total = torch.cuda.mem_get_info(device)
    on_device = _adapter_bytes(config.adapter_device_gib, "adapter_device_gib", free - later_bytes, total)
    return AdapterBudgets(on_device, memory, "--adapter-device-gib")


def _adapter_bytes(gib: float | None, name: str, free: int, total: int) -> int:
    if gib is None:
        num_bytes, why = max(_MIN_ADAPTER_BYTES, int(free * _ADAPTER_SHARE)), "half of what is free beside the KV cache"
    else:
        num_bytes, why = int(gib * 2**30), f"--{name.replace('_', '-')}"
    if num_bytes > total:
        raise UserError(
            f"{name}={num_bytes / 2**30:g} is more than the memory there is ({total / 2**30:.1f} GiB); lower it "
            f"(--{name.replace('_', '-')})",
            param=name,
        )
    logger.info("%s is %.3g GiB (%s)", name, num_bytes / 2**30, why)
    return num_bytes


def memory_bytes(device: torch.device) -> int:
    """All memory that the device has, in use or not."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return physical_bytes()
