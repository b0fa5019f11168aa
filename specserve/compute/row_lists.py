"""What the rows of a step are, as lists: the same for every path, whatever tensors it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..schedule.scheduler import ScheduledSequence


class RowLists(NamedTuple):
    """One entry a row, those of each item one after the other."""

    tokens: list[int]
    positions: list[int]
    slot_mapping: list[int]

    @classmethod
    def of(cls, items: Sequence[ScheduledSequence], counts: Sequence[int], block_size: int) -> RowLists:
        """`counts` is how many rows each item has."""
        tokens: list[int] = []
        positions: list[int] = []
        slot_mapping: list[int] = []
        for item, count in zip(items, counts, strict=True):
            seq = item.seq
            first, table = seq.num_computed, seq.block_table
            if count == 1:  # most of them: a slice and a range cost five times as much
                tokens.append(seq.tokens[first])
                positions.append(first)
                slot_mapping.append(table[first // block_size] * block_size + first % block_size)
            else:
                own = range(first, first + count)
                tokens += seq.tokens[first : first + item.num_rows]
                tokens += item.drafts
                positions += own
                slot_mapping += [table[at // block_size] * block_size + at % block_size for at in own]
        return cls(tokens, positions, slot_mapping)
