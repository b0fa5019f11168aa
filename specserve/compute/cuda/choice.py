"""Decides, once at start, whether the Triton kernels serve the model, and logs why not.

`kernels=auto` takes them on CUDA where triton is installed and the model allows it; `native` (there) and `triton` fail
where they do not, and so does a quantization, which torch has none of. On a CPU they run under Triton's interpreter
only, which is for tests.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...config import EngineConfig, Exact, Quantization
from ...errors import ModelError
from ...kernels.device_limits import FIRST_CAPABILITY
from ...kernels.scaled_weights import COLUMNS_OF_K, DTYPES
from ...model.config import ModelConfig
from ..decoder_weights import Weights

if TYPE_CHECKING:
    from .decoder import TritonDecoder

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 256
HEAD_DIM_STEP = 8


@dataclass(frozen=True, slots=True)
class TritonChoice:
    """That the Triton kernels shall serve. `is_required`: rather fail than fall back to torch."""

    is_required: bool = False
    exact: Exact = "auto"
    quantization: Quantization = "none"

    @property
    def name(self) -> str:
        return "the Triton path"

    def cannot_serve(self, config: ModelConfig, dtype: torch.dtype) -> str | None:
        """Why the Triton kernels cannot serve this model; None if they can."""
        if config.head_dim > MAX_HEAD_DIM or config.head_dim % HEAD_DIM_STEP:
            return f"head_dim={config.head_dim} is not a multiple of {HEAD_DIM_STEP} up to {MAX_HEAD_DIM}"
        if self.quantization == "none":
            return None
        if dtype.itemsize != 2:
            return (
                f"quantization={self.quantization} has activations of 16 bits, and the model's dtype is "
                f"{str(dtype).removeprefix('torch.')}; --dtype bf16 or fp16"
            )
        for size in (config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim):
            if size % COLUMNS_OF_K:
                return f"quantization={self.quantization} needs multiples of {COLUMNS_OF_K} inputs, not {size}"
        return None

    def build(self, config: ModelConfig, weights: Weights) -> TritonDecoder:
        from .build import build  # late: 0.4 s of a start, where another path serves

        return build(config, weights, self.exact, self.quantization)


def choose_triton(config: EngineConfig, device: torch.device) -> TritonChoice | None:
    """The Triton kernels as `config` wants them on `device`, or None. Raises `ModelError` where they are required."""
    is_cuda = device.type == "cuda"
    if config.kernels == "triton" and not is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ModelError(f"kernels=triton needs CUDA, or Triton's interpreter (TRITON_INTERPRET=1), not {device.type}")
    if not (is_cuda or config.kernels == "triton"):
        return None
    quantized = config.quantization != "none"
    if quantized and config.quantization not in DTYPES:
        raise ModelError(f"quantization={config.quantization} is for CPUs; on CUDA set it to {' or '.join(DTYPES)}")
    if config.kernels == "torch":
        if quantized:
            raise ModelError(
                f"quantization={config.quantization} needs Triton's kernels, and kernels is torch; leave it at auto"
            )
        return None
    is_required = config.kernels != "auto" or quantized
    if (missing := _missing(device)) is not None:
        if is_required:
            wanted = f"quantization={config.quantization}" if quantized else f"kernels={config.kernels}"
            raise ModelError(f"{wanted} needs {missing}")
        logger.warning("the fast path needs %s: torch serves instead, slower", missing)
        return None
    return TritonChoice(is_required or config.exact == "on", config.exact, config.quantization)


def _missing(device: torch.device) -> str | None:
    """What the kernels need and have not. Whether a CUDA device is there at all is for others to say."""
    if importlib.util.find_spec("triton") is None:
        return "triton, which is not installed"
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    if torch.version.cuda is None:  # of torch for AMD's, which calls them CUDA devices, too
        return f"an NVIDIA GPU, which torch {torch.__version__} is not for"
    capability = torch.cuda.get_device_capability(device)
    if capability >= FIRST_CAPABILITY:
        return None
    have, first = (".".join(map(str, version)) for version in (capability, FIRST_CAPABILITY))
    return f"a device of compute capability {first} or newer (A100, RTX 30), and {device} has {have}"
