"""What an adapter is held against: the base model as it is served, whoever asks: the engine, a command, the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels.linear import compute_dtype
from ..model.config import ModelConfig
from ..model.weights import DTYPES, checked_source
from .base_copies import BaseCopies
from .lookahead import BaseIdentity


@dataclass(frozen=True, slots=True)
class ServedBase:
    """A base model's shape, files and dtypes; adapters and heads that do not fit it are refused."""

    config: ModelConfig
    identity: BaseIdentity | None  # None: what an adapter brings to draft with is not looked at
    copies: BaseCopies
    lora_dtype: torch.dtype  # that LoRA weights are converted to

    @classmethod
    def of(cls, model_dir: Path, config: ModelConfig, weight_dtype: torch.dtype, lora_dtype: torch.dtype) -> ServedBase:
        """Of a model directory whose weights are served as `weight_dtype`, before any quantization."""
        copies = BaseCopies(model_dir, config.tie_word_embeddings, weight_dtype)
        return cls(config, BaseIdentity.of(model_dir), copies, lora_dtype)

    @classmethod
    def of_files(cls, model_dir: Path, device: torch.device, dtype: str = "auto") -> ServedBase:
        """As a server on `device` has it with this `dtype`, without loading it. Raises `ModelError`."""
        config = ModelConfig.from_dir(model_dir)
        source = checked_source(model_dir, config)
        weights = source.dtype() if dtype == "auto" else DTYPES[dtype]
        lora = compute_dtype(weights, device)
        return cls.of(model_dir, config, weights, lora)
