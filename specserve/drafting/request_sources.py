"""Which sources draft for a request, and what they learn of finished outputs.

A request gets what its adapter brings, or the base, and what was served to its tenant; nothing of another adapter or
tenant. Whether they are asked, and how far drafts go, is decided elsewhere (`proposer`, `growth`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..adapters.lookahead import Lookahead
from ..adapters.lora import LoraAdapter
from ..config import EngineConfig
from ..drafters.acceptance import SharedAcceptance
from ..drafters.history_source import HistorySource
from ..drafters.ngram import NgramSource
from ..drafters.prediction import PredictionSource
from ..drafters.protocol import DraftSource, Heads
from ..messages import GenerateRequest
from ..pooling_messages import AnyRequest
from .base_head import BaseHead
from .served_history import ServedHistories
from .serving_log import ServingLog


class RequestSources:
    """Of one engine; `adapters` are its own by their content hashes, `base_lookahead` is what --base-head names."""

    def __init__(
        self,
        config: EngineConfig,
        heads: Heads,
        vocab_size: int,
        adapters: Mapping[str, LoraAdapter],
        base_lookahead: Lookahead | None,
        base_hash: str,
    ):
        self._heads, self._adapters = heads, adapters
        self._base, self._base_hash = BaseHead(base_lookahead), base_hash
        self._served: ServedHistories | None = None
        self._log: ServingLog | None = None
        if config.serving_log:
            self._log = ServingLog(Path(config.serving_log).expanduser(), int(config.serving_log_mib * (1 << 20)))
        if config.learn_history:
            directory = Path(config.history_dir).expanduser() if config.history_dir else None
            self._served = ServedHistories(directory, vocab_size)

    def of(self, request: GenerateRequest) -> list[DraftSource]:
        """In order of preference among equals; to be called once for each sequence."""
        sources: list[DraftSource] = [NgramSource()]
        if request.speculation.mode == "ngram":
            return sources
        if request.prediction_token_ids:
            sources.insert(0, PredictionSource(request.prediction_token_ids, len(request.prompt_token_ids)))
        adapter = self._adapter(request)
        history = self._base.history
        if adapter is not None:
            history = adapter.lookahead.history if adapter.lookahead is not None else None
        if self._served is not None and adapter is not None:
            history = self._served.current(adapter.content_hash, request.cache_salt, history)
        if history is not None:
            sources.append(HistorySource(history, len(request.prompt_token_ids)))
        if (head := self._base.head_of(adapter)) is not None:
            sources.append(self._heads.source(request.request_id, head, request.prompt_token_ids))
        return sources

    def acceptance_of(self, request: GenerateRequest) -> SharedAcceptance:
        """The record that it shares with others of its adapter."""
        return self._base.acceptance_of(self._adapter(request))

    def learn(self, request: AnyRequest, output: Sequence[int]) -> None:
        """Remember a finished output, if the engine is set to."""
        adapter = self._adapter(request)
        if self._log is not None:
            weights_hash = adapter.lora_hash if adapter is not None else self._base_hash
            self._log.add(weights_hash, request.cache_salt, request.prompt_token_ids, output)
        if self._served is None or adapter is None or len(output) < 2:
            return
        base = adapter.lookahead.history if adapter.lookahead is not None else None
        self._served.learn(adapter.content_hash, request.cache_salt, base, output)

    def adapter_left(self, content_hash: str) -> None:
        """Let go of an adapter that has left."""
        self._heads.release_weights()
        self._base.adapter_left(content_hash)

    def close(self) -> None:
        """Save what was learned."""
        if self._served is not None:
            self._served.close()
        if self._log is not None:
            self._log.close()

    def _adapter(self, request: AnyRequest) -> LoraAdapter | None:
        return self._adapters.get(request.adapter_hash or "")
