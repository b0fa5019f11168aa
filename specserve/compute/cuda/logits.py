"""A step's logits: the rows that need any are picked out of what the layers left, then the lm_head, as one graph.

Owns the buffers of logits, and what is picked beside them for the heads: each row's token, hidden state and tapped
layers. More rows than these have, such as log-probabilities of long prompts may need, get buffers of their own and no
graph.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Seq

import numpy as np
import torch

from .buckets import padded
from .buffers import Layout, Page
from .decoder import TritonDecoder
from .graph_cache import GraphCache
from .layers import LayersPart
from .lora import LM_HEAD, DeviceAdapterSlots


class LogitsPart:
    """The lm_head of `decoder` over rows of `layers`; results are views, good until the next step.

    Up to `num_logits` padded rows have a buffer and a graph.
    """

    def __init__(
        self,
        decoder: TritonDecoder,
        layers: LayersPart,
        slots: DeviceAdapterSlots,
        graphs: GraphCache,
        num_logits: int,
    ):
        device, num_taps, (max_rows, hidden) = decoder.device, len(layers.tap_layers), layers.hidden.shape
        self._decoder, self._layers, self._slots, self._graphs = decoder, layers, slots, graphs
        self._page = Page(_layout(max_rows).num_bytes, device)
        self._lora_blocks = slots.new_blocks(max_rows)
        self._logits = torch.zeros(num_logits, decoder.config.vocab_size, dtype=torch.float32, device=device)
        self.padded = self._logits[:0]  # of the latest step, with its bucket's padding
        self.eager_reason: str | None = None  # why that step's logits are in no graph's buffers
        # Of the rows with logits: their tokens, hidden states [L, H], and tapped layers' outputs [taps, L, H].
        self.picked_tokens = torch.zeros(num_logits, dtype=torch.int64, device=device)
        self.picked_hidden = layers.hidden.new_zeros(num_logits, hidden)
        self.picked_taps = layers.taps.new_zeros(num_taps, num_logits, hidden)

    @property
    def nothing(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and hidden states of no row."""
        return self._logits[:0], self.picked_hidden[:0]

    def queue(self, rows: Seq[int] | np.ndarray, slots: Seq[int] | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Queue logits [L, V] and hidden states [L, H] of `rows`; `slots` are their adapters'."""
        num_logits, size = len(rows), padded(len(rows))
        layout = _layout(size)
        host = self._page.host(layout)
        host["rows"][:num_logits], host["rows"][num_logits:] = rows, 0
        host["slots"][:num_logits], host["slots"][num_logits:] = slots, -1
        self._page.upload(layout)
        if size > self._logits.shape[0]:  # log-probabilities of long prompts
            logits = torch.empty(size, self._logits.shape[1], dtype=torch.float32, device=self._logits.device)
            picked = self._layers.hidden.new_empty(size, self.picked_hidden.shape[1])
        else:
            logits, picked = self._logits[:size], self.picked_hidden[:size]
        with_lora = LM_HEAD in self._slots.targeted_groups and max(slots) >= 0
        reason = f"it needs more than {self._logits.shape[0]} rows of logits" if size > self._logits.shape[0] else None
        self.padded, self.eager_reason = logits, reason
        self._graphs.launch(
            ("logits", size, with_lora), lambda: self._launch(layout, logits, picked, with_lora), reason
        )
        return logits[:num_logits], picked[:num_logits]

    def _launch(self, layout: Layout, logits: torch.Tensor, picked: torch.Tensor, with_lora: bool) -> None:
        fields, layers = self._page.device(layout), self._layers
        torch.index_select(layers.hidden, 0, fields["rows"], out=picked)
        size = picked.shape[0]
        if size <= self.picked_tokens.shape[0]:
            torch.index_select(layers.tokens, 0, fields["rows"], out=self.picked_tokens[:size])
            for idx in range(len(layers.tap_layers)):
                torch.index_select(layers.taps[idx], 0, fields["rows"], out=self.picked_taps[idx, :size])
        lora = None
        if with_lora:
            lora = self._slots.launches(self._lora_blocks, fields["slots"], size, frozenset((LM_HEAD,)))
        self._decoder.logits_into(picked, logits, lora)


@functools.cache
def _layout(num_rows: int) -> Layout:
    return Layout.of({"rows": (num_rows, torch.int64), "slots": (num_rows, torch.int32)})
