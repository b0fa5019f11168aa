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
        start = max_keys = 0
        for item, seat, slot in zip(items, seats, slots, strict=True):
            count = item.num_rows + len(item.drafts)
            self._fill_one(host, item, start, count)
            host["row_seats"][start : start + count] = seat
            host["row_slots"][start : start + count] = slot
            max_keys = max(max_keys, item.seq.num_computed + count)
            start += count
        _pad(host, start)
        host["split_len"][0] = split_len_for(max_keys, num_splits)

    def upload_padding(self, num_rows: int) -> None:
        """Inputs of a step of nothing but padding."""
        host = self.host(num_rows)
        _pad(host, 0)
        host["split_len"][0] = split_len_for(1, 1)
        self.upload(num_rows)

    def _fill_one(self, host: dict[str, np.ndarray], item: ScheduledSequence, start: int, count: int) -> None:
        seq, end, first = item.seq, start + count, item.seq.num_computed
        host["tokens"][start : start + item.num_rows] = seq.tokens[first : first + item.num_rows]
        if item.drafts:
            host["tokens"][start + item.num_rows : end] = item.drafts
        positions = np.arange(first, first + count)
        host["positions"][start:end] = positions
        first_block = first // self.block_size
        blocks = np.asarray(seq.block_table[first_block : (first + count - 1) // self.block_size + 1])
        where = positions - first_block * self.block_size
        host["slot_mapping"][start:end] = blocks[where // self.block_size] * self.block_size + where % self.block_size


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
