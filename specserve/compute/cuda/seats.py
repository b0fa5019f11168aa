"""Places of sequences in device tables that outlive a step: block tables are kept there and grow by what is new.

A sequence takes a seat when it is first scheduled and keeps it while it is scheduled often enough; a seat is handed on,
least recently used first, when there is no free one. Sequences are told apart by `Sequence.table_id`, which is another
one whenever their block table was emptied: under one id a table only grows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from ...schedule.sequence import Sequence
from .buffers import Layout, Page

_MAX_UPDATES = 4096  # new entries that go up asynchronously; more at once wait for the device


@dataclass(slots=True)
class _Seat:
    number: int
    last_step: int
    num_known: int = 0  # entries of the table on the device


class Seats:
    """`tables` is [num_seats, width] int32 on `device`: row i holds the physical blocks of the sequence on seat i.

    `host_tables` are the same on the host, where they are up to date first.
    """

    def __init__(self, num_seats: int, width: int, device: torch.device):
        self.tables = torch.zeros(num_seats, width, dtype=torch.int32, device=device)
        self.host_tables = np.zeros((num_seats, width), dtype=np.int32)
        self._width = width
        self._taken: dict[object, _Seat] = {}  # by table_id
        self._free = list(range(num_seats))[::-1]
        self._num_steps = 0
        self._page = Page(_update_layout(_MAX_UPDATES).num_bytes, device)

    def seat(self, sequences: Seq[Sequence]) -> list[int]:
        """The seat of each of `sequences`, at most as many as there are seats; their tables are brought up to date."""
        assert len(sequences) <= self.tables.shape[0], (len(sequences), self.tables.shape[0])
        self._num_steps += 1
        taken, step = self._taken, self._num_steps
        seats: list[int] = []
        changed: list[tuple[int, Sequence, _Seat | None]] = []  # place in `seats`
        for seq in sequences:
            seat = taken.get(seq.table_id)
            if seat is None:
                changed.append((len(seats), seq, None))
                seats.append(-1)
                continue
            seat.last_step = step
            if seat.num_known < len(seq.block_table):
                changed.append((len(seats), seq, seat))
            seats.append(seat.number)
        if changed:
            self._bring_up_to_date(changed, seats)
        return seats

    def _bring_up_to_date(self, changed: list[tuple[int, Sequence, _Seat | None]], seats: list[int]) -> None:
        index: list[int] = []
        blocks: list[int] = []
        for place, seq, known in changed:
            seat = known or self._take(seq)
            seats[place] = seat.number
            new = seq.block_table[seat.num_known :]
            self.host_tables[seat.number, seat.num_known : len(seq.block_table)] = new
            start = seat.number * self._width + seat.num_known
            index += range(start, start + len(new))
            blocks += new
            seat.num_known += len(new)
        if index:
            self._update(index, blocks)

    def _take(self, seq: Sequence) -> _Seat:
        """A free seat, or the one that was not used for longest; those of this step are all marked."""
        if self._free:
            number = self._free.pop()
        else:
            oldest = min(self._taken, key=lambda table_id: self._taken[table_id].last_step)
            number = self._taken.pop(oldest).number
        seat = self._taken[seq.table_id] = _Seat(number, self._num_steps)
        return seat

    def seat_of(self, seq: Sequence) -> int:
        """The seat of a sequence of the latest step."""
        return self._taken[seq.table_id].number

    def _update(self, index: list[int], blocks: list[int]) -> None:
        flat, num = self.tables.view(-1), len(index)
        if num > _MAX_UPDATES:
            device = flat.device
            flat.index_copy_(
                0, torch.tensor(index, device=device), torch.tensor(blocks, dtype=torch.int32, device=device)
            )
            return
        layout = _update_layout(1 << (num - 1).bit_length())
        host = self._page.host(layout)
        host["index"][:num], host["block"][:num] = index, blocks
        self._page.upload(layout)
        fields = self._page.device(layout)
        flat.index_copy_(0, fields["index"][:num], fields["block"][:num])


@functools.cache
def _update_layout(num: int) -> Layout:
    return Layout.of({"index": (num, torch.int64), "block": (num, torch.int32)})
