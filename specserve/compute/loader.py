"""Loads a model directory strictly, for the path that serves it: safetensors only, every tensor accounted for.

A model that loads is the model on disk (`model/weights.py`). Tensors are read one by one, so that the peak is the model
plus one layer. Knows which paths there are, and nothing of them but their choice.py and build.py.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeAlias

import torch

from ..errors import ModelError
from ..model.config import ModelConfig
from ..model.weights import DTYPES, StoredWeights, checked_source
from .cuda import build as cuda_path
from .cuda.choice import TritonChoice
from .cuda.decoder import TritonDecoder
from .native import build as native_path
from .native.choice import NativeChoice
from .native.decoder import NativeDecoder
from .path import ComputePath, PathInputs
from .torch import build as torch_path
from .torch.decoder import Decoder

logger = logging.getLogger(__name__)

AnyDecoder: TypeAlias = Decoder | NativeDecoder | TritonDecoder


def load_model(
    path: str | Path,
    device: torch.device,
    dtype: str = "auto",
    native: NativeChoice | None = None,
    triton: TritonChoice | None = None,
) -> AnyDecoder:
    """Read the model directory `path` onto `device`. `dtype` is auto (as saved), fp32, bf16 or fp16.

    With `native` the native forward of the CPU takes the model where it can, with `triton` the Triton kernels do. What
    they cannot is logged with the reason, or raised as `ModelError` where the choice says that nothing else will do.
    """
    path = Path(path)
    config = ModelConfig.from_dir(path)
    source = checked_source(path, config)
    weight_dtype = source.dtype() if dtype == "auto" else DTYPES[dtype]
    weights = StoredWeights(config, source, device, weight_dtype)
    if native is not None:
        reason = native.cannot_serve(config, weight_dtype)
        if reason is None:
            return native_path.build(config, weights, native)
        if native.is_required:
            raise ModelError(f"the native CPU path was asked for and cannot serve this model: {reason}")
        logger.warning("the native CPU path cannot serve this model (%s); torch serves it, slower", reason)
    if triton is not None:
        reason = triton.cannot_serve(config)
        if reason is None:
            return cuda_path.build(config, weights)
        if triton.is_required:
            raise ModelError(f"the Triton kernels were asked for and cannot serve this model: {reason}")
        logger.warning("the Triton kernels cannot serve this model (%s); torch serves it, slower", reason)
    return torch_path.build(config, weights)


def make_path(decoder: AnyDecoder, inputs: PathInputs) -> ComputePath:
    """What runs the steps of `decoder`."""
    if isinstance(decoder, TritonDecoder):
        return cuda_path.make_path(decoder, inputs)
    if isinstance(decoder, NativeDecoder):
        return native_path.make_path(decoder, inputs)
    return torch_path.make_path(decoder, inputs)
