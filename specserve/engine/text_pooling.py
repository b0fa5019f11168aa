"""Texts that are pooled: what a request asks of an adapter, and the values that come of a text's hidden states.

All arithmetic is on the host, text by text and in one order, so that a text's values are the same bits whatever else
was in its step. The forward gives means of hidden states (`compute/`); what is made of them is here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..adapter_kinds import GENERATES, PoolingType, check_kind
from ..adapters.lora import LoraAdapter
from ..errors import UserError
from ..pooling_messages import BASE_NORMALIZE, BASE_POOLING, KINDS_OF_TASK, AnyRequest, PoolRequest

_AT_ONCE = 1 << 18  # values of a score matrix that are multiplied together


@dataclass(frozen=True, slots=True)
class TextPooling:
    """What one text is to become."""

    pooling: PoolingType
    normalize: bool = False
    dimensions: int | None = None
    score: np.ndarray | None = None  # [outputs, H] float32

    def values(self, hidden: np.ndarray) -> np.ndarray:
        """Of pooled hidden states [H] float32: [dimensions] or [outputs], float32."""
        if self.score is not None:
            return outputs_of(self.score, hidden)
        kept = hidden[: self.dimensions]
        if not self.normalize:
            return kept
        wide = kept.astype(np.float64)
        length = np.sqrt((wide * wide).sum())
        return (wide / length if length else wide).astype(np.float32)


def outputs_of(score: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """[outputs] float32, score [outputs, H] times hidden [H]: by sums of one row each, which no other row changes."""
    num_outputs, size = score.shape
    step = max(1, _AT_ONCE // size)
    wide = hidden.astype(np.float64)
    parts = [(score[start : start + step] * wide).sum(axis=-1) for start in range(0, num_outputs, step)]
    return np.concatenate(parts).astype(np.float32)


def text_pooling(request: AnyRequest, adapter: LoraAdapter | None, hidden_size: int) -> TextPooling | None:
    """What `request` asks of its adapter, None for the base; None of a request that generates.

    Raises `UserError` where the adapter is of another kind, or has not what is asked.
    """
    if not isinstance(request, PoolRequest):
        if adapter is not None:
            check_kind(adapter.name, adapter.adapter_type, GENERATES)
        return None
    params = request.pooling
    if adapter is not None:
        check_kind(adapter.name, adapter.adapter_type, KINDS_OF_TASK[params.task])
    elif params.task == "score":
        raise UserError(
            "the base model has no score head; name an adapter that re-ranks or classifies",
            param="model",
            code="wrong_adapter_type",
        )
    info = adapter.pooling.info if adapter is not None and adapter.pooling is not None else None
    if params.task == "score":
        if (params.pooling, params.normalize, params.dimensions) != (None, None, None):
            raise UserError("pooling, normalize and dimensions are of embeddings; leave them out", param="pooling")
        assert adapter is not None and adapter.pooling is not None and adapter.pooling.score is not None
        return TextPooling(adapter.pooling.info.pooling, score=adapter.pooling.score.numpy())
    trained = info.dimensions if info is not None else ()
    if params.dimensions not in (None, hidden_size, *trained):
        shorter = f"{', '.join(map(str, trained))} or {hidden_size}" if trained else f"{hidden_size}"
        raise UserError(
            f"dimensions is {params.dimensions}; this model gives embeddings of {shorter}, and was trained for no "
            "others",
            param="dimensions",
        )
    pooling = params.pooling or (info.pooling if info is not None else BASE_POOLING)
    normalize = info.normalize if info is not None else BASE_NORMALIZE
    return TextPooling(pooling, normalize if params.normalize is None else params.normalize, params.dimensions)
