"""A step's rows as data: what the host knows of them, filled into one page and copied to the device at once.

Every padded number of rows has its own layout over the page. A padded row reads token 0, writes no KV and is in no
tile.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import torch

from ...kernels.ragged_attention import split_len_for
from ...schedule.scheduler import ScheduledSequence
from .buffers import Layout, Page


class StepRows:
    """The inputs of up to `max_rows` rows; KV lies in blocks of `block_size` tokens."""

    def __init__(self, max_rows: int, block_size: int, device: torch.device):
        self.block_size = block_size
        self._page = Page(_layout(max_rows).num_bytes, device)

    def host(self, num_rows: int) -> dict[str, np.ndarray]:
        """Views to fill, by field, once the copy of the step before is done."""
        return self._page.host(_layout(num_rows))

    def device(self, num_rows: int) -> dict[str, torch.Tensor]:
        """Views that kernels read, by field."""
        return self._page.device(_layout(num_rows))

    def upload(self, num_rows: int) -> None:
        self._page.upload(_layout(num_rows))

    def fill(
        self,
        host: dict[str, np.ndarray],
        items: Seq[ScheduledSequence],
        seats: Seq[int],
        slots: Seq[int],
        num_splits: int,
    ) -> None:
        """The rows of `items`, one after the other, and padding behind them; `slots` are their adapters'."""
        size = self.block_size
        tokens: list[int] = []
        positions: list[int] = []
        slot_mapping: list[int] = []
        row_seats: list[int] = []
        row_slots: list[int] = []
        max_keys = 0
        for item, seat, slot in zip(items, seats, slots, strict=True):
            seq, first = item.seq, item.seq.num_computed
            count = item.num_rows + len(item.drafts)
            end, table = first + count, seq.block_table
            if count == 1:  # most of them: a slice and a range cost five times as much
                tokens.append(seq.tokens[first])
                positions.append(first)
                slot_mapping.append(table[first // size] * size + first % size)
                row_seats.append(seat)
                row_slots.append(slot)
            else:
                tokens += seq.tokens[first : first + item.num_rows]
                tokens += item.drafts
                positions += range(first, end)
                slot_mapping += [table[at // size] * size + at % size for at in range(first, end)]
                row_seats += [seat] * count
                row_slots += [slot] * count
            max_keys = max(max_keys, end)
        num_rows = len(tokens)
        host["tokens"][:num_rows], host["positions"][:num_rows] = tokens, positions
        host["slot_mapping"][:num_rows] = slot_mapping
        host["row_seats"][:num_rows], host["row_slots"][:num_rows] = row_seats, row_slots
        _pad(host, num_rows)
        host["split_len"][0] = split_len_for(max_keys, num_splits)

    def upload_padding(self, num_rows: int) -> None:
        """Inputs of a step of nothing but padding."""
        host = self.host(num_rows)
        _pad(host, 0)
        host["split_len"][0] = split_len_for(1, 1)
        self.upload(num_rows)


def _pad(host: dict[str, np.ndarray], start: int) -> None:
    """Make the rows from `start` on padding."""
    host["tokens"][start:] = host["positions"][start:] = 0
    host["slot_mapping"][start:] = host["row_seats"][start:] = host["row_slots"][start:] = -1


def _layout(num_rows: int) -> Layout:
    return Layout.of(
        {
            "tokens": (num_rows, torch.int64),
            "positions": (num_rows, torch.int64),
            "slot_mapping": (num_rows, torch.int64),
            "row_seats": (num_rows, torch.int32),
            "row_slots": (num_rows, torch.int32),
            "split_len": (1, torch.int32),
        }
    )
