"""The adapters of one step in torch: a loop over them, each over its own rows, read where the adapters hold them.

The reference, on any device. Stacks of equal ranks, planned into few batched products, made a step of 16 adapters
1.6 times as fast and one of a single adapter no faster (docs/log.md, 2026-11-26); what serves where speed matters is
`compute/native/lora.py` and `compute/cuda/lora.py`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...adapters.lora import LoraAdapter
from ...kernels.lora import lora_add_pair_
from ...model.config import ModelConfig
from ...model.shapes import module_shapes
from ..decoder_weights import GROUPS


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """One adapter's rows of a step."""

    adapter: LoraAdapter
    rows: slice
    logits: slice  # those of the rows whose logits are needed


class LoraBatch:
    """Adds each row's own adapter to the outputs of the base model's modules, in place."""

    def __init__(self, runs: Sequence[AdapterRows], sizes: dict[str, tuple[int, int]]):
        self._runs, self._sizes = runs, sizes

    def add_(self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """y [T, out] += LoRA(x [T, in]) for the fused linear `group` of `layer`."""
        for run in self._runs:
            column = 0
            for module in GROUPS[group]:
                end = column + self._sizes[module][1]
                pair = run.adapter.layers.get((layer, module))
                if pair is not None:
                    lora_add_pair_(y[run.rows, column:end], x[run.rows], pair)
                column = end

    def add_embedding_(self, tokens: torch.Tensor, y: torch.Tensor) -> None:
        """y [T, H] += LoRA of the embedding for tokens [T]."""
        for run in self._runs:
            if run.adapter.embed is not None:
                a, b, scale = run.adapter.embed
                y[run.rows] += scale * (a[:, tokens[run.rows]].t().float() @ b.float().t())

    def add_lm_head_(self, x: torch.Tensor, logits: torch.Tensor) -> None:
        """logits [L, V] += LoRA of the lm_head for hidden rows x [L, H]."""
        for run in self._runs:
            if run.adapter.lm_head is not None:
                lora_add_pair_(logits[run.logits], x[run.logits], run.adapter.lm_head)


class AdapterSlots:
    """The adapters of the latest steps; slot i is the i-th that the step names."""

    def __init__(self, config: ModelConfig):
        self._sizes = module_shapes(config)
        self._active: dict[str, LoraAdapter] = {}
        self._slot_of: dict[str, int] = {}

    def slot_of(self, content_hash: str) -> int:
        return self._slot_of[content_hash]

    def activate(self, active: Sequence[LoraAdapter]) -> None:
        """Give every adapter of `active` (no duplicates) a slot for the next batch."""
        self._active = {adapter.content_hash: adapter for adapter in active}
        self._slot_of = {content_hash: slot for slot, content_hash in enumerate(self._active)}

    def free(self, content_hash: str) -> None:
        """Forget an adapter that was unloaded, so that its weights can be freed."""
        self._active.pop(content_hash, None)

    def batch(self, runs: Sequence[tuple[str | None, int]], logits_indices: Sequence[int]) -> LoraBatch | None:
        """The step's view for `runs` of (content hash or None, rows), in row order; None without any adapter.

        `logits_indices` are the rows whose logits are needed, ascending.
        """
        found: list[AdapterRows] = []
        start = 0
        for content_hash, num_rows in runs:
            rows, start = slice(start, start + num_rows), start + num_rows
            if content_hash is None:
                continue
            adapter = self._active[content_hash]
            if found and found[-1].adapter is adapter and found[-1].rows.stop == rows.start:
                rows = slice(found.pop().rows.start, rows.stop)
            logits = slice(*(bisect_left(logits_indices, row) for row in (rows.start, rows.stop)))
            found.append(AdapterRows(adapter, rows, logits))
        return LoraBatch(found, self._sizes) if found else None
