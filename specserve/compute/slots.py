"""What every path does with the adapters of a step: each gets a slot, and rows stand in the order of slots.

Row order: the base's sequences first, then adapter by adapter, so that each adapter's rows are one segment however many
requests name it. What a slot is, an index into a list, tables or addresses, is each path's own (its lora.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ..adapters.lora import LoraAdapter
from ..schedule.scheduler import ScheduledSequence


class Slots(Protocol):
    """Where a path keeps the adapters of steps."""

    def slot_of(self, content_hash: str) -> int:
        """The slot of an adapter of the latest `activate`."""
        ...

    def activate(self, active: Sequence[LoraAdapter]) -> None:
        """Make every adapter of `active` (no duplicates) have a slot."""
        ...

    def free(self, content_hash: str) -> None:
        """Forget an adapter that was unloaded, so that its weights can be freed."""
        ...


def slot_of(slots: Slots, item: ScheduledSequence) -> int:
    """The slot of a sequence's adapter, -1 without one."""
    return -1 if item.seq.adapter_hash is None else slots.slot_of(item.seq.adapter_hash)


def take_slots(
    slots: Slots, items: Sequence[ScheduledSequence], adapters: Mapping[str, LoraAdapter]
) -> tuple[list[ScheduledSequence], list[LoraAdapter]]:
    """`items` in the order of their rows, and the adapters that they name, each of which has a slot now.

    `adapters` holds every adapter that they name, by content hash.
    """
    named = dict.fromkeys(item.seq.adapter_hash for item in items if item.seq.adapter_hash is not None)
    active = [adapters[content_hash] for content_hash in named]
    if active:
        slots.activate(active)
    return sorted(items, key=lambda item: slot_of(slots, item)), active
