"""What an adapter that does not generate brings beside its LoRA: how it pools, and its score matrix.

The score matrix stays in main memory, in float32, whatever the LoRA is served in and wherever: it is read once a text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..adapter_files import WEIGHTS_FILE
from ..adapter_kinds import AdapterType, PoolingInfo
from .config_json import refuse
from .pooling_config import MAX_OUTPUTS, SCORE, PoolingConfig, adapter_type_of, pooling_info
from .tensors import FLOATS
from .weights_file import StoredTensor, WeightsFile


@dataclass(frozen=True, slots=True)
class Pooling:
    """Of an adapter that embeds, re-ranks or classifies."""

    adapter_type: AdapterType
    info: PoolingInfo
    score: torch.Tensor | None  # [outputs, H] float32; None of one that embeds

    @property
    def num_bytes(self) -> int:
        return self.score.nbytes if self.score is not None else 0


def read_pooling(
    name: str, task_type: str | None, config: PoolingConfig | None, file: WeightsFile, hidden_size: int
) -> Pooling | None:
    """Of adapter `name` with the pooling file `config`, if it has one; None of one that generates.

    Raises `AdapterError`.
    """
    stored = file.tensors.get(SCORE)
    kind = adapter_type_of(name, task_type, config, stored.shape if stored is not None else None)
    if stored is not None:
        _check_score(name, stored, hidden_size)
    info = pooling_info(name, kind, config, stored.shape[0] if stored is not None else 0, hidden_size)
    if info is None:
        return None
    score = None
    if stored is not None:
        score = file.tensor(stored).to(torch.float32, copy=True)
        if not bool(torch.isfinite(score).all()):
            refuse(name, f"{SCORE} holds NaN or infinite values")
    return Pooling(kind, info, score)


def _check_score(name: str, stored: StoredTensor, hidden_size: int) -> None:
    shape, wanted = list(stored.shape), f"[outputs, {hidden_size}]"
    if len(shape) != 2 or shape[1] != hidden_size or stored.dtype not in FLOATS:
        refuse(
            name,
            f"{SCORE} in {WEIGHTS_FILE} is {stored.dtype} {shape}, the base model wants {wanted} of floating-point "
            "numbers; was it trained for another base?",
        )
    if not 1 <= shape[0] <= MAX_OUTPUTS:
        refuse(name, f"{SCORE} has {shape[0]} rows; 1 to {MAX_OUTPUTS} are served")
