"""The adapters of one step in torch on the CPU: which rows use which weights, for every layer.

`AdapterSlots` keeps the stacked weights of the adapters that recent steps used, so that steady traffic over the same
adapters builds nothing. `LoraBatch` is one step's view of them; the decoder calls its hooks and knows no adapter.
The counterpart on a GPU is `compute/cuda/lora.py`, that of the native CPU path `compute/native/lora.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...adapters.lora import GROUPS, LoraAdapter
from ...adapters.tensors import module_shapes
from ...kernels.lora_stack import LoraStack, add_lora_
from ...kernels.segments import Segments
from ...model.config import ModelConfig

KEEP_STEPS = 64  # an adapter that no row used for so many steps leaves the stacks when they are built next


class LoraBatch:
    """Adds each row's own adapter to the outputs of the base model's modules, in place."""

    def __init__(self, slots: AdapterSlots, segments: Segments, logits_segments: Segments):
        self._slots = slots
        self._segments = segments
        self._logits_segments = logits_segments

    def add_(self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """y [T, out] += LoRA(x [T, in]) for the fused linear `group` of `layer`."""
        stack = self._slots.stacks.get((layer, group))
        if stack is not None:
            add_lora_(y, x, stack, self._segments)

    def add_embedding_(self, tokens: torch.Tensor, y: torch.Tensor) -> None:
        """y [T, H] += LoRA of the embedding for tokens [T]."""
        segments = self._segments
        for start, end, slot in zip(segments.starts, segments.starts[1:], segments.slots, strict=False):
            pair = self._slots.adapters[slot].embed if slot >= 0 else None
            if pair is not None:
                rows = pair.a.t()[tokens[start:end]]  # [rows, R]
                y[start:end] += (rows @ pair.b.t()) * pair.scale

    def add_lm_head_(self, x: torch.Tensor, logits: torch.Tensor) -> None:
        """logits [L, V] += LoRA of the lm_head for hidden rows x [L, H]."""
        stack = self._slots.lm_head
        if stack is not None:
            delta = torch.zeros(logits.shape, dtype=x.dtype, device=x.device)
            add_lora_(delta, x, stack, self._logits_segments)
            logits += delta


class AdapterSlots:
    """Stacked weights of a changing set of adapters; slot i of every stack is `adapters[i]`."""

    def __init__(self, config: ModelConfig):
        self._config = config
        self._shapes = module_shapes(config)
        self.adapters: list[LoraAdapter] = []
        self.stacks: dict[tuple[int, str], LoraStack] = {}
        self.lm_head: LoraStack | None = None
        self._slot_of: dict[str, int] = {}
        self._step = 0
        self._last_used: dict[str, int] = {}  # content hash -> step
        self.num_rebuilds = 0

    def slot_of(self, content_hash: str) -> int:
        return self._slot_of[content_hash]

    def activate(self, active: Sequence[LoraAdapter]) -> None:
        """Make every adapter of `active` (no duplicates) have a slot.

        Stacks are rebuilt when one is missing, or when most of them are long idle: while prompts are read adapters come
        and go from step to step, and a rebuild copies every adapter's weights.
        """
        self._step += 1
        self._last_used.update((adapter.content_hash, self._step) for adapter in active)
        recent = [a for a in self.adapters if self._step - self._last_used[a.content_hash] < KEEP_STEPS]
        missing = [adapter for adapter in active if adapter.content_hash not in self._slot_of]
        if missing or len(self.adapters) > 2 * len(recent):
            self._build([*recent, *missing])

    def drop(self, content_hash: str) -> None:
        """Forget an adapter that was unloaded, so that its weights can be freed."""
        if content_hash in self._slot_of:
            self._build([adapter for adapter in self.adapters if adapter.content_hash != content_hash])

    def batch(self, runs: Sequence[tuple[str | None, int]], logits_indices: Sequence[int]) -> LoraBatch | None:
        """The step's view for `runs` of (content hash or None, rows), in row order; None without any adapter."""
        if all(content_hash is None for content_hash, _ in runs):
            return None
        slot_runs = [(-1 if h is None else self._slot_of[h], num_rows) for h, num_rows in runs]
        segments = Segments.build(slot_runs, len(self.adapters))
        logits_segments = segments.select(logits_indices) if self.lm_head is not None else segments
        return LoraBatch(self, segments, logits_segments)

    def _build(self, adapters: list[LoraAdapter]) -> None:
        self.num_rebuilds += 1
        self.adapters = adapters
        self._slot_of = {adapter.content_hash: slot for slot, adapter in enumerate(adapters)}
        self._last_used = {content_hash: self._last_used[content_hash] for content_hash in self._slot_of}
        self.stacks = {}
        for layer in range(self._config.num_layers):
            for group, modules in GROUPS.items():
                pairs = [[adapter.layers.get((layer, module)) for module in modules] for adapter in adapters]
                if any(pair is not None for row in pairs for pair in row):
                    self.stacks[layer, group] = LoraStack(pairs, tuple(self._shapes[module][1] for module in modules))
        heads = [[adapter.lm_head] for adapter in adapters]
        used = any(pair is not None for (pair,) in heads)
        self.lm_head = LoraStack(heads, (self._config.vocab_size,)) if used else None
