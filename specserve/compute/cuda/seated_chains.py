"""Which row of the table of chains the sequence on each seat has, so that a step finds all of them at once.

A row belongs to a sequence's source and may be another's once that is gone; a seat may be another sequence's. Each
counts its owners, and what is known here holds while both counts stand.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from ...drafters.chains import NOBODY, ChainTable
from ...schedule.sequence import Sequence
from .seats import Seats


class SeatedChains:
    """Rows of `chains` by the seats of `seats`."""

    def __init__(self, chains: ChainTable, seats: Seats):
        self._chains, self._seats = chains, seats
        num_seats = len(seats.owners)
        self._rows = np.full(num_seats, NOBODY, np.int64)
        self._seat_owners = np.full(num_seats, -1, np.int64)
        self._row_owners = np.zeros(num_seats, np.int64)

    def rows(self, sequences: Seq[Sequence], seats: np.ndarray) -> np.ndarray:
        """The row of each sequence, [S] int64, `NOBODY` where it has none; `seats` [S] are theirs."""
        chains, rows = self._chains, self._rows[seats]
        is_known = (
            (rows != NOBODY)
            & (self._seat_owners[seats] == self._seats.owners[seats])
            & (self._row_owners[seats] == chains.owners[rows])
        )
        unknown = np.flatnonzero(~is_known)
        if len(unknown):
            found = [chains.row_of.get(sequences[idx].request_id, NOBODY) for idx in unknown.tolist()]
            rows[unknown] = found
            places = seats[unknown]
            self._rows[places] = found
            self._seat_owners[places], self._row_owners[places] = self._seats.owners[places], chains.owners[found]
        return rows
