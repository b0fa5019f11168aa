"""What an adapter is held against: the base model as it is served, whoever asks: the engine, a command, the trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .base_copies import BaseCopies
from .config import EngineConfig
from .device_choice import choose_device
from .kernels.linear import compute_dtype
from .lookahead import BaseIdentity
from .model.config import ModelConfig


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
    def of_files(cls, model_dir: Path, dtype: str = "auto") -> ServedBase:
        """As a server on this machine has it with this `dtype`, without loading it. Raises `ModelError`."""
        from .model.loader import DTYPES, checked_source  # imports the decoders, which import adapters

        config = ModelConfig.from_dir(model_dir)
        source = checked_source(model_dir, config)
        weights = source.dtype() if dtype == "auto" else DTYPES[dtype]
        # bf16 is served as fp32 where a CPU lacks it: what fits bf16 fits there too.
        lora = weights if weights == torch.bfloat16 else compute_dtype(weights, choose_device(EngineConfig()))
        return cls.of(model_dir, config, weights, lora)
