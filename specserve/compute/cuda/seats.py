"""Places of sequences in device tables that outlive a step: block tables are kept there and grow by what is new.

A sequence takes a seat when it is first scheduled and keeps it while it is scheduled often enough; a seat is handed on,
least recently used first, when there is no free one. Sequences are told apart by `Sequence.table_id`, which is another
one whenever their block table was emptied: under one id a table only grows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

import torch

from ...schedule.sequence import Sequence
from .buffers import Layout, Page

_MAX_UPDATES = 4096  # new entries that go up asynchronously; more at once wait for the device


class Seats:
    """`tables` is [num_seats, width] int32 on `device`: row i holds the physical blocks of the sequence on seat i."""

    def __init__(self, num_seats: int, width: int, device: torch.device):
        self.tables = torch.zeros(num_seats, width, dtype=torch.int32, device=device)
        self._width = width
        self._taken: OrderedDict[object, list[int]] = OrderedDict()  # table_id -> [seat, entries on the device]
        self._free = list(range(num_seats))[::-1]
        self._page = Page(_update_layout(_MAX_UPDATES).num_bytes, device)

    def seat(self, sequences: Seq[Sequence]) -> list[int]:
        """The seat of each of `sequences`, at most as many as there are seats; their tables are brought up to date."""
        assert len(sequences) <= self.tables.shape[0], (len(sequences), self.tables.shape[0])
        for seq in sequences:
            if seq.table_id in self._taken:
                self._taken.move_to_end(seq.table_id)
        seats: list[int] = []
        index: list[int] = []
        blocks: list[int] = []
        for seq in sequences:
            entry = self._taken.get(seq.table_id)
            if entry is None:
                seat = self._free.pop() if self._free else self._taken.popitem(last=False)[1][0]
                entry = self._taken[seq.table_id] = [seat, 0]
            seat, num_known = entry
            seats.append(seat)
            new = seq.block_table[num_known:]
            if new:
                start = seat * self._width + num_known
                index += range(start, start + len(new))
                blocks += new
                entry[1] += len(new)
        if index:
            self._update(index, blocks)
        return seats

    def seat_of(self, seq: Sequence) -> int:
        """The seat of a sequence of the latest step."""
        return self._taken[seq.table_id][0]

    def _update(self, index: list[int], blocks: list[int]) -> None:
        flat, num = self.tables.view(-1), len(index)
        if num > _MAX_UPDATES:
            device = flat.device
            flat.index_copy_(
                0, torch.tensor(index, device=device), torch.tensor(blocks, dtype=torch.int32, device=device)
            )
            return
        layout = _update_layout(num)
        host = self._page.host(layout)
        host["index"][:], host["block"][:] = index, blocks
        self._page.upload(layout)
        fields = self._page.device(layout)
        flat.index_copy_(0, fields["index"], fields["block"])


def _update_layout(num: int) -> Layout:
    return Layout.of({"index": (num, torch.int64), "block": (num, torch.int32)})
