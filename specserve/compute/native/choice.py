"""Decides, once at start, whether the native forward of the CPU serves the model, and logs why not.

`kernels=auto` takes it where a C++ compiler and the model allow it, `native` fails where they do not, and so does the
name of a level of instructions, which is then the one that serves.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ...config import EngineConfig
from ...errors import ModelError
from ...kernels.native import KEYS_PER_TILE, MAX_HEAD_DIM, Library, load_library
from ...kernels.native_build import NativeError
from ...kernels.native_levels import LEVEL_NAMES, LEVELS
from ...kernels.packed import QUANTIZED
from ...model.config import ModelConfig
from ..decoder_weights import Weights
from .build import build
from .decoder import NativeDecoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NativeChoice:
    """That, and how, the native forward shall serve. `is_required`: rather fail than fall back to torch."""

    library: Library
    num_threads: int
    block_size: int
    quantization: str = "none"
    is_required: bool = False

    @property
    def name(self) -> str:
        return "the native CPU path"

    def cannot_serve(self, config: ModelConfig, dtype: torch.dtype) -> str | None:
        """Why the native forward cannot serve this model; None if it can."""
        if self.block_size % KEYS_PER_TILE:
            return f"block_size={self.block_size} is no multiple of {KEYS_PER_TILE}"
        if config.head_dim > MAX_HEAD_DIM:
            return f"head_dim={config.head_dim} is above {MAX_HEAD_DIM}"
        if dtype == torch.float16 and self.quantization == "none":
            return "float16 weights have no native form; --dtype bf16 or fp32 has"
        return None

    def build(self, config: ModelConfig, weights: Weights) -> NativeDecoder:
        return build(config, weights, self.library, self.num_threads, self.quantization)


def choose_native(config: EngineConfig, device: torch.device) -> NativeChoice | None:
    """The native path as `config` wants it on `device`, or None for torch. Raises `ModelError` where it is required."""
    level = config.kernels if config.kernels in LEVEL_NAMES else None
    quantized = config.quantization != "none" and device.type == "cpu" and config.kernels != "triton"  # of ours
    if quantized and config.quantization not in QUANTIZED:
        raise ModelError(f"quantization={config.quantization} is for CUDA; on a CPU set it to {' or '.join(QUANTIZED)}")
    is_required = (config.kernels == "native" and device.type == "cpu") or level is not None or quantized
    reason = None
    if device.type != "cpu":
        reason = f"the model runs on {device.type}"
    elif config.kernels in ("torch", "triton"):
        reason = f"kernels is {config.kernels}"
    else:
        try:
            library = load_library(level)
        except NativeError as error:
            reason = str(error)
    if reason is not None:
        if level is not None:
            raise ModelError(f"kernels={level} cannot be had here: {reason}; {_instead(device)}")
        if quantized:
            raise ModelError(f"quantization={config.quantization} needs the native CPU path: {reason}")
        if is_required:
            raise ModelError(f"kernels=native needs the native CPU path: {reason}")
        if device.type == "cpu" and config.kernels == "auto":
            logger.warning("the native CPU path is off, torch serves instead, slower: %s", reason)
        return None
    if library.build_s:
        logger.info("built the native CPU kernels in %.1f s; they are cached", library.build_s)
    why = f"; not {library.not_higher}" if library.not_higher else "; kernels asks for it" if level else ""
    logger.info("native CPU path: instructions are %s%s", library.level, why)
    num_threads = config.num_threads or torch.get_num_threads()
    is_required = is_required or config.exact == "on"
    return NativeChoice(library, num_threads, config.block_size, config.quantization, is_required)


def _instead(device: torch.device) -> str:
    if device.type != "cpu":
        return "levels of instructions are CPUs'; leave kernels at auto"
    possible = [level.name for level in LEVELS if level.missing() is None]
    return f"leave kernels at auto for the best there is, or name another ({', '.join(possible)})"
