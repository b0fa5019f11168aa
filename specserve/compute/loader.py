"""Loads a model directory strictly, for the path that serves it: safetensors only, every tensor accounted for.

A model that loads is the model on disk (`model/weights.py`). Tensors are read one by one, so that the peak is the model
plus one layer. Knows which paths there are, and nothing of them but their choice.py and build.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch

from ..config import EngineConfig
from ..errors import ModelError
from ..model.config import ModelConfig
from ..model.weights import DTYPES, StoredWeights, checked_source
from .cuda.choice import choose_triton
from .decoder_weights import Weights
from .native import build as native_path
from .native.choice import choose_native
from .native.decoder import NativeDecoder
from .path import ComputePath, PathInputs
from .torch import build as torch_path
from .torch.decoder import Decoder

if TYPE_CHECKING:
    from .cuda.decoder import TritonDecoder

logger = logging.getLogger(__name__)

AnyDecoder: TypeAlias = "Decoder | NativeDecoder | TritonDecoder"


class PathChoice(Protocol):
    """That a path shall serve, and how."""

    @property
    def name(self) -> str:
        """In messages."""
        ...

    @property
    def is_required(self) -> bool:
        """Whether to fail rather than fall back to torch."""
        ...

    def cannot_serve(self, config: ModelConfig, dtype: torch.dtype) -> str | None:
        """Why the path cannot serve this model with weights of `dtype`; None if it can."""
        ...

    def build(self, config: ModelConfig, weights: Weights) -> AnyDecoder: ...


def choose_paths(config: EngineConfig, device: torch.device) -> list[PathChoice]:
    """The paths that `config` wants on `device`, best first, before torch. Raises `ModelError` for what cannot be."""
    chosen: tuple[PathChoice | None, ...] = choose_native(config, device), choose_triton(config, device)
    choices = [choice for choice in chosen if choice is not None]
    if config.exact == "on" and not choices:
        raise ModelError(
            f"exact=on needs the native path or Triton's, and torch would serve (kernels={config.kernels}, on "
            f"{device.type}); set exact to auto or off, or kernels to native to see what is missing"
        )
    return choices


def load_model(
    path: str | Path, device: torch.device, dtype: str = "auto", choices: Sequence[PathChoice] = ()
) -> AnyDecoder:
    """Read the model directory `path` onto `device`. `dtype` is auto (as saved), fp32, bf16 or fp16.

    The first of `choices` that can serve the model takes it, else torch. What one cannot is logged with the reason, or
    raised as `ModelError` where the choice says that nothing else will do.
    """
    path = Path(path)
    config = ModelConfig.from_dir(path)
    source = checked_source(path, config)
    weight_dtype = source.dtype() if dtype == "auto" else DTYPES[dtype]
    return build_decoder(config, StoredWeights(config, source, device, weight_dtype), choices)


def build_decoder(config: ModelConfig, weights: Weights, choices: Sequence[PathChoice]) -> AnyDecoder:
    """The decoder of `weights` by the first of `choices` that can serve it, else torch's. Raises `ModelError`."""
    for choice in choices:
        reason = choice.cannot_serve(config, weights.dtype)
        if reason is None:
            return choice.build(config, weights)
        if choice.is_required:
            raise ModelError(f"{choice.name} was asked for and cannot serve this model: {reason}")
        logger.warning("%s cannot serve this model (%s); torch serves it, slower", choice.name, reason)
    return torch_path.build(config, weights)


def make_path(decoder: AnyDecoder, inputs: PathInputs) -> ComputePath:
    """What runs the steps of `decoder`."""
    if isinstance(decoder, NativeDecoder):
        return native_path.make_path(decoder, inputs)
    if isinstance(decoder, Decoder):
        return torch_path.make_path(decoder, inputs)
    from .cuda import build as cuda_path  # late: it is 0.4 s of a start on a CPU, which has no use for it

    return cuda_path.make_path(decoder, inputs)
