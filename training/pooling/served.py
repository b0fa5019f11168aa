"""Texts through the real engine, in this process: what an adapter's vectors and outputs are once it is served."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...engine.engine import Engine
from ...errors import UserError
from ...messages import RequestFailed
from ...pooling_messages import Pooled, PoolingParams, PoolRequest
from ..evaluation.answers import make_engine

_BATCH = 32  # sequences at a time


class ServedTexts:
    """The adapter in `directory` on its base model, for texts of at most `max_len` tokens."""

    def __init__(self, model_dir: Path, directory: Path, max_len: int):
        self.engine = make_engine(model_dir, batch=_BATCH, max_len=max_len + 1)
        self._content_hash = self.engine.load_adapter(directory.name, directory).content_hash

    def vectors(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Embeddings [N, H] as the adapter makes them."""
        return self._values(texts, self._content_hash, PoolingParams("embed"))

    def base_vectors(self, texts: Sequence[Sequence[int]], pooling: PoolingParams) -> torch.Tensor:
        """Embeddings [N, H] of the base model alone."""
        return self._values(texts, None, pooling)

    def outputs(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Outputs [N, labels] of the adapter's score matrix."""
        return self._values(texts, self._content_hash, PoolingParams("score"))

    def _values(self, texts: Sequence[Sequence[int]], content_hash: str | None, params: PoolingParams) -> torch.Tensor:
        return torch.from_numpy(pooled_values(self.engine, [(content_hash, text) for text in texts], params))


def pooled_values(
    engine: Engine, texts: Sequence[tuple[str | None, Sequence[int]]], params: PoolingParams
) -> np.ndarray:
    """Values [N, ...] of (adapter's content hash, token ids); prefixes are cached within one call only.

    Raises `UserError` if one fails.
    """
    salt = uuid.uuid4().hex
    for idx, (content_hash, ids) in enumerate(texts):
        engine.add_request(PoolRequest(str(idx), list(ids), params, adapter_hash=content_hash, cache_salt=salt))
    found: dict[int, np.ndarray] = {}
    while len(found) < len(texts):
        for event in engine.step():
            if isinstance(event, RequestFailed):
                raise UserError(f"a text failed: {event.error.message}")
            assert isinstance(event, Pooled)
            found[int(event.request_id)] = np.frombuffer(event.values, "<f4")
    return np.stack([found[idx] for idx in range(len(texts))])
