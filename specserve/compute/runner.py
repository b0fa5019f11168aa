"""Scheduled sequences in, logits out: builds the step's `Batch` and runs the decoder on it.

Owns the decoder, the KV tensors and the adapters' slots; rows stand in the order of slots (`slots.py`). For the torch
and the native path; `cuda/runner.py` is the counterpart that fills buffers in place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from ..adapters.lora import LoraAdapter
from ..drafters.head_files import LookaheadHeadFile
from ..model.config import ModelConfig
from ..schedule.logits_rows import LogitsRows
from ..schedule.pooled_rows import PooledSpan, pooled_spans
from ..schedule.scheduler import ScheduledSequence
from .batch import Batch
from .kv_cache import KVCache
from .pooled_sums import add_up, rows_of
from .row_lists import row_tokens
from .slots import Slots, take_slots
from .step_output import StepOutput

if TYPE_CHECKING:
    from .native.lora import NativeLoraBatch
    from .torch.lora import LoraBatch


class BatchSlots(Slots, Protocol):
    """Slots of adapters that make a step's `Batch.lora`."""

    def batch(
        self, runs: Sequence[tuple[str | None, int]], logits_indices: Sequence[int]
    ) -> LoraBatch | NativeLoraBatch | None:
        """The step's view for `runs` of (content hash or None, rows), in row order; None without any adapter."""
        ...


class BatchDecoder(Protocol):
    """A decoder that takes its step as a `Batch`."""

    config: ModelConfig
    device: torch.device

    def step(
        self, batch: Batch, kv: KVCache, taps: dict[int, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed hidden states [L + P, H] of the rows `batch.hidden_rows`, and logits [L, V] float32 of the first L;
        writes all rows' keys and values.

        Each layer in `taps` gets its output there, [L + P, H].
        """
        ...


class ModelRunner:
    """Runs one forward over whatever was scheduled."""

    def __init__(
        self, decoder: BatchDecoder, kv: KVCache, slots: BatchSlots, base_head: LookaheadHeadFile | None = None
    ):
        self.decoder = decoder
        self.kv = kv
        self.slots = slots
        self._base_head = base_head
        self._no_rows = torch.empty(0)

    def forward(self, items: Sequence[ScheduledSequence], adapters: Mapping[str, LoraAdapter]) -> StepOutput:
        """One forward over `items`; `adapters` holds every adapter that they name, by content hash."""
        items, _, active = take_slots(self.slots, items, adapters)
        batch, needed, spans = self._build(items)
        heads = [adapter.lookahead.head for adapter in active if adapter.lookahead is not None]
        taps = {head.config.tap_layer: self._no_rows for head in (*heads, self._base_head) if head is not None}
        states, logits = self.decoder.step(batch, self.kv, taps)  # [L + P, H], [L, V]
        hidden = states[: len(needed.rows)] if spans else states
        if not needed.rows:  # nothing but unfinished prefill chunks, and texts that are pooled
            taps = {}
        pooled = add_up(spans, states[len(needed.rows) :]) if spans else None  # at last: it keeps the sums
        return StepOutput(logits, needed.groups, needed.items, needed.prompt_rows, hidden, taps, pooled)

    def _build(self, items: Sequence[ScheduledSequence]) -> tuple[Batch, LogitsRows, list[PooledSpan]]:
        counts = [item.num_rows + len(item.drafts) for item in items]
        needed, spans = LogitsRows(items, counts), pooled_spans(items, counts)
        runs = [(item.seq.adapter_hash, count) for item, count in zip(items, counts, strict=True)]
        batch = Batch(
            token_ids=row_tokens(items),
            starts=[item.seq.num_computed for item in items],
            query_lens=counts,
            tables=[item.seq.block_table for item in items],
            hidden_rows=needed.rows + rows_of(spans),
            num_logits=len(needed.rows),
            block_size=self.kv.block_size,
            device=self.decoder.device,
            lora=self.slots.batch(runs, needed.rows),
        )
        return batch, needed, spans
