"""What the rows of a step are: the same for every path, whatever tensors it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..schedule.scheduler import ScheduledSequence


def row_tokens(items: Sequence[ScheduledSequence]) -> list[int]:
    """The tokens of all rows, drafts behind each item's own."""
    tokens: list[int] = []
    for item in items:
        first = item.seq.num_computed
        if item.num_rows == 1:
            tokens.append(item.seq.tokens[first])
        else:
            tokens += item.seq.tokens[first : first + item.num_rows]
        if item.drafts:
            tokens += item.drafts
    return tokens


class RowLists(NamedTuple):
    """One entry a row, those of each item one after the other."""

    tokens: list[int]
    positions: np.ndarray  # [T] int64
    items: np.ndarray  # [T] int64, which item each is of
    ends: np.ndarray  # [S] int64, the position behind each item's rows, without its drafts

    @classmethod
    def of(cls, items: Sequence[ScheduledSequence], counts: Sequence[int]) -> RowLists:
        """`counts` is how many rows each item has."""
        firsts = [item.seq.num_computed for item in items]
        starts = np.array(firsts, dtype=np.int64)
        if sum(counts) == len(items):  # one row each, mostly
            tokens = [item.seq.tokens[first] for item, first in zip(items, firsts, strict=True)]
            return cls(tokens, starts, np.arange(len(items)), starts + 1)
        tokens = row_tokens(items)
        num_rows = np.array(counts)
        row_items = np.repeat(np.arange(len(items)), num_rows)
        positions = (starts + num_rows - num_rows.cumsum())[row_items] + np.arange(len(tokens))
        return cls(tokens, positions, row_items, starts + [item.num_rows for item in items])

    def slot_mapping(self, tables: np.ndarray, table_of_row: np.ndarray, block_size: int) -> np.ndarray:
        """Where each row's key and value go, [T] int64; row i's blocks are tables[table_of_row[i]], of [S, N]."""
        blocks, offsets = np.divmod(self.positions, block_size)
        return tables[table_of_row, blocks].astype(np.int64) * block_size + offsets
