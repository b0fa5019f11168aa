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


def take_slots(
    slots: Slots, items: Sequence[ScheduledSequence], adapters: Mapping[str, LoraAdapter]
) -> tuple[list[ScheduledSequence], list[int], list[LoraAdapter]]:
    """`items` in the order of their rows, the slot of each (-1 without adapter), and the adapters that they name.

    All of these have a slot now. `adapters` holds every adapter that they name, by content hash.
    """
    by_adapter: dict[str | None, list[ScheduledSequence]] = {}
    for item in items:
        by_adapter.setdefault(item.seq.adapter_hash, []).append(item)
    active = [adapters[content_hash] for content_hash in by_adapter if content_hash is not None]
    if not active:
        return list(items), [-1] * len(items), []
    slots.activate(active)
    ordered: list[ScheduledSequence] = []
    slot_of_each: list[int] = []
    segments = ((-1 if key is None else slots.slot_of(key), own) for key, own in by_adapter.items())
    for slot, own in sorted(segments, key=lambda segment: segment[0]):
        ordered += own
        slot_of_each += [slot] * len(own)
    return ordered, slot_of_each, active
