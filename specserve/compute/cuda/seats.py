"""Places of sequences in device tables that outlive a step: block tables are kept there and grow by what is new.

A sequence takes a seat when it is first scheduled and keeps it while it is scheduled often enough; a seat is handed on,
least recently used first, when there is no free one. Sequences are told apart by `Sequence.table_id`, which is another
one whenever their block table was emptied: under one id a table only grows. What is new goes up with the step's rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from ...schedule.sequence import Sequence
from .buffers import Writer


@dataclass(slots=True, eq=False)
class _Seat:
    """A sequence points to its seat; whose seat it really is, the table says that it holds."""

    number: int
    table_id: object = None
    last_step: int = 0
    num_known: int = 0  # entries of the table on the device


class Seats:
    """`tables` is [num_seats, width] int32 on `device`: row i holds the physical blocks of the sequence on seat i.

    `flat` [num_seats * width + 1] are the same entries and one at the end, `nowhere`, that nobody reads. `host_tables`
    are the tables on the host, where they are up to date first; `owners` [num_seats] int64 is another number for each
    table that a seat held.
    """

    def __init__(self, num_seats: int, width: int, device: torch.device):
        self.nowhere = num_seats * width
        self.flat = torch.zeros(self.nowhere + 1, dtype=torch.int32, device=device)
        self.tables = self.flat[: self.nowhere].view(num_seats, width)
        self.host_tables = np.zeros((num_seats, width), dtype=np.int32)
        self.owners = np.zeros(num_seats, np.int64)
        self._width = width
        self._seats = [_Seat(number) for number in range(num_seats)]
        self._oldest: deque[tuple[_Seat, int]] = deque()  # seats and their steps when they were looked through last
        self._num_steps = 0
        self._new: tuple[list[int], list[int]] = [], []  # places in `flat`, and blocks, that the device may lack
        self._writer = Writer(device)

    def seat(self, sequences: Seq[Sequence]) -> np.ndarray:
        """The seats of `sequences`, [S] int64, at most all that there are; what is new of them is there to take."""
        assert len(sequences) <= self.tables.shape[0], (len(sequences), self.tables.shape[0])
        self._num_steps += 1
        step = self._num_steps
        if self._new[0]:  # of a step that failed
            self._write(0)
        seats: list[int] = []
        changed: list[tuple[int, Sequence]] = []  # place in `seats`
        for seq in sequences:
            seat: _Seat | None = seq.seat
            if seat is None or seat.table_id is not seq.table_id:
                changed.append((len(seats), seq))
                seats.append(-1)
                continue
            seat.last_step = step
            if seat.num_known < len(seq.block_table):
                changed.append((len(seats), seq))
            seats.append(seat.number)
        if changed:
            self._bring_up_to_date(changed, seats)
        return np.array(seats, np.int64)

    def seats_of(self, sequences: Seq[Sequence]) -> np.ndarray:
        """The seats of sequences of the latest step."""
        return np.array([seq.seat.number for seq in sequences], np.int64)

    def _bring_up_to_date(self, changed: list[tuple[int, Sequence]], seats: list[int]) -> None:
        index, blocks = self._new
        for place, seq in changed:
            seat = seq.seat if seats[place] >= 0 else self._take(seq)
            seats[place] = seat.number
            new = seq.block_table[seat.num_known :]
            self.host_tables[seat.number, seat.num_known : len(seq.block_table)] = new
            start = seat.number * self._width + seat.num_known
            index += range(start, start + len(new))
            blocks += new
            seat.num_known += len(new)

    def take_new(self, room: int) -> tuple[list[int], list[int]]:
        """Places in `flat` and the blocks that belong there, at most `room`, for the caller to write before they are
        read, and to say so (`wrote_new`): else the next `seat` writes them. What is more is written here."""
        if len(self._new[0]) > room:
            self._write(room)
        return self._new

    def wrote_new(self) -> None:
        """What was taken is queued to be written."""
        self._new = [], []

    def _write(self, start: int) -> None:
        """All that is new but the first `start`, now and in stream order."""
        index, blocks = self._new
        self._writer([(self.flat, np.array(index[start:], np.int64), np.array(blocks[start:], np.int32))])
        del index[start:], blocks[start:]

    def _take(self, seq: Sequence) -> _Seat:
        """The seat that was not used for longest; those of this step are all marked."""
        while True:
            if not self._oldest:
                unused = [(seat, seat.last_step) for seat in self._seats if seat.last_step < self._num_steps]
                self._oldest.extend(sorted(unused, key=lambda entry: entry[1]))
            seat, last_step = self._oldest.popleft()
            if seat.last_step == last_step:  # else it was used since
                break
        seat.table_id, seat.last_step, seat.num_known = seq.table_id, self._num_steps, 0
        self.owners[seat.number] += 1
        seq.seat = seat
        return seat
