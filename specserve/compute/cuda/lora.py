"""The adapters of a step on a GPU: slots in static tables, so that adapters come and go without any launch changing.

The counterpart of `compute/torch/lora.py`. `DeviceAdapterSlots` owns the tables of addresses, the scratch memory
and which adapter has which slot; `DeviceLoraBatch` holds what one step's launches read and does nothing but launch.
Invariant: tensors that a captured CUDA graph holds keep their addresses; an adapter that joins or leaves changes data
in them, ordered by the stream. So a graph is right for any adapters, as long as it launches the groups that they
target.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

import torch

from ...adapters.lora import LoraAdapter
from ...errors import UserError
from ...kernels.lora import LoraPair
from ...kernels.lora_blocks import list_blocks_, lora_add_, lora_embedding_add_, max_blocks, new_blocks, scratch_size
from ...kernels.lora_tables import BLOCK_R, LoraShape, LoraTables
from ...model.config import ModelConfig
from ...model.shapes import module_shapes
from ..decoder_weights import GROUPS

EMBEDDING, LM_HEAD = "embed_tokens", "lm_head"  # keys of the tables beside (layer, group)


def lora_shapes(config: ModelConfig) -> dict[Hashable, LoraShape]:
    """What adapters may target, by (layer, group) and by name."""
    sizes = module_shapes(config)
    shapes: dict[Hashable, LoraShape] = {
        (layer, group): LoraShape(sizes[modules[0]][0], tuple(sizes[module][1] for module in modules))
        for layer in range(config.num_layers)
        for group, modules in GROUPS.items()
    }
    return shapes | {key: LoraShape(sizes[key][0], (sizes[key][1],)) for key in (EMBEDDING, LM_HEAD)}


class DeviceLoraBatch:
    """Adds each row's own adapter to the outputs of the base model's modules, in place, by launches alone.

    `blocks` cover the rows of x and y (`DeviceAdapterSlots.launches` lists them); they are listed anew in each replay.
    Only what `groups` names, of GROUPS, EMBEDDING and LM_HEAD, is launched: what any adapter targets, and goes by these
    rows.
    """

    def __init__(self, slots: DeviceAdapterSlots, blocks: torch.Tensor, groups: Collection[str]):
        self._tables, self._scratch = slots.tables, slots.scratch
        self._blocks, self.groups = blocks, frozenset(groups)

    def add_(self, layer: int, group: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """y [T, out] += LoRA(x [T, in]) for the fused linear `group` of `layer`."""
        if group in self.groups:
            lora_add_(y, x, self._tables.entry((layer, group)), self._blocks, self._scratch)

    def add_embedding_(self, tokens: torch.Tensor, y: torch.Tensor) -> None:
        """y [T, H] += LoRA of the embedding for tokens [T]."""
        if EMBEDDING in self.groups:
            lora_embedding_add_(y, tokens, self._tables.entry(EMBEDDING), self._blocks, self._scratch)

    def add_lm_head_(self, x: torch.Tensor, logits: torch.Tensor) -> None:
        """logits [L, V] += LoRA of the lm_head for hidden rows x [L, H]."""
        if LM_HEAD in self.groups:
            lora_add_(logits, x, self._tables.entry(LM_HEAD), self._blocks, self._scratch)


class DeviceAdapterSlots:
    """Up to `capacity` adapters of rank up to `max_rank` on the device, the least recently used making room.

    `scratch` serves launches over `max_rows` rows. `targeted_groups` names what any adapter so far targets, of GROUPS,
    EMBEDDING and LM_HEAD; it only grows, and a graph that was captured for fewer must be captured again.
    """

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        capacity: int,
        max_rows: int,
        *,
        dtype: torch.dtype,
        max_rank: int = 256,
    ):
        shapes = lora_shapes(config)
        self.capacity, self.max_rank = capacity, max_rank
        self.tables = LoraTables(shapes, capacity, max_rank, dtype, device)
        self.targeted_groups: frozenset[str] = frozenset()
        self._keys = [*((0, group) for group in GROUPS), EMBEDDING, LM_HEAD]  # all layers have one shape
        self.scratch = torch.empty(self.scratch_size(max_rows), dtype=torch.float32, device=device)
        self._slot_of: dict[str, int] = {}  # least recently used first
        self._free = list(range(capacity - 1, -1, -1))

    def scratch_size(self, num_rows: int) -> int:
        """fp32 elements of scratch that the launches of a step of `num_rows` rows need, one after the other."""
        return max(scratch_size(self.tables.entry(key), num_rows, is_embedding=key == EMBEDDING) for key in self._keys)

    def new_blocks(self, max_rows: int) -> torch.Tensor:
        """Room for what `launches` lists of up to `max_rows` rows."""
        return new_blocks(max_rows * -(-self.max_rank // BLOCK_R), self.tables.device)

    def launches(
        self, blocks: torch.Tensor, row_slots: torch.Tensor, max_segments: int, groups: frozenset[str]
    ) -> DeviceLoraBatch:
        """The LoRA of rows, or of rows with logits, of slots `row_slots` [T]; each asks for its part of `groups` only.

        Launches what lists the rows' `blocks` (of `new_blocks`); they are in at most `max_segments` runs of one slot.
        """
        blocks = blocks[: 1 + max_blocks(row_slots.shape[0], max_segments, self.tables)]
        list_blocks_(blocks, row_slots, self.tables)
        return DeviceLoraBatch(self, blocks, groups)

    def slot_of(self, content_hash: str) -> int:
        return self._slot_of[content_hash]

    def activate(self, active: Sequence[LoraAdapter]) -> None:
        """Make every adapter of `active` (no duplicates) have a slot; none of these loses its own.

        Raises `UserError` when there are more than `capacity`, or one of a rank beyond `max_rank`.
        """
        if len(active) > self.capacity:
            raise UserError(
                f"{len(active)} adapters in one step, but there is room for {self.capacity}; raise max_adapters or run "
                "fewer adapters at a time",
                param="max_adapters",
            )
        for adapter in active:
            if adapter.max_rank > self.max_rank:
                raise UserError(
                    f"adapter {adapter.name!r} has rank {adapter.max_rank}, but the limit is {self.max_rank}; raise "
                    "max_lora_rank",
                    param="max_lora_rank",
                )
        missing = [adapter for adapter in active if adapter.content_hash not in self._slot_of]
        for adapter in active:
            if adapter.content_hash in self._slot_of:  # now the most recently used
                self._slot_of[adapter.content_hash] = self._slot_of.pop(adapter.content_hash)
        for adapter in missing:
            if not self._free:
                self._free.append(self._slot_of.pop(next(iter(self._slot_of))))
            slot = self._free[-1]
            self._fill(slot, adapter)  # before anything names the slot, should it raise
            self._slot_of[adapter.content_hash] = self._free.pop()

    def free(self, content_hash: str) -> None:
        """Forget an adapter that was unloaded, so that its weights can be freed."""
        slot = self._slot_of.pop(content_hash, None)
        if slot is not None:
            self.tables.clear_slot(slot)
            self._free.append(slot)

    def _fill(self, slot: int, adapter: LoraAdapter) -> None:
        group_of = {module: (group, m) for group, modules in GROUPS.items() for m, module in enumerate(modules)}
        pairs: dict[Hashable, list[LoraPair | None]] = {}
        for (layer, module), pair in adapter.layers.items():
            group, m = group_of[module]
            pairs.setdefault((layer, group), [None] * len(GROUPS[group]))[m] = pair
        groups = {group_of[module][0] for _, module in adapter.layers}
        for key, extra in ((EMBEDDING, adapter.embed), (LM_HEAD, adapter.lm_head)):
            if extra is not None:
                pairs[key] = [extra]
                groups.add(key)
        self.tables.set_slot(slot, pairs)
        self.targeted_groups |= groups
