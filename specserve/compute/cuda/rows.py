"""A step's rows as data: what the host knows of them, filled into one page and copied to the device at once.

Every padded number of rows has its own layout over the page. A padded row reads token 0, writes no KV and is in no
tile. Blocks that are new in the sequences' tables go up in the same copy, as many as there are rows; the layers' graph
puts them where they belong.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from ..row_lists import RowLists
from .buffers import Layout, Page
from .seats import Seats


class StepRows:
    """The inputs of up to `max_rows` rows; KV lies in blocks of `block_size` tokens.

    `nowhere` is the place of entries of block tables that are padding.
    """

    def __init__(self, max_rows: int, block_size: int, nowhere: int, device: torch.device):
        self.block_size, self._nowhere = block_size, nowhere
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
        rows: RowLists,
        seats: Seats,
        row_seats: np.ndarray,
        row_slots: np.ndarray,
    ) -> None:
        """The rows of a step, with the seats of their sequences and the slots of their adapters, and padding."""
        num_rows = len(rows.tokens)
        host["tokens"][:num_rows], host["positions"][:num_rows] = rows.tokens, rows.positions
        host["slot_mapping"][:num_rows] = rows.slot_mapping(seats.host_tables, row_seats, self.block_size)
        host["row_seats"][:num_rows], host["row_slots"][:num_rows] = row_seats, row_slots
        places, blocks = seats.take_new(len(host["new_places"]))
        host["new_places"][: len(places)], host["new_blocks"][: len(blocks)] = places, blocks
        self._pad(host, num_rows, len(places))

    def upload_padding(self, num_rows: int) -> None:
        """Inputs of a step of nothing but padding."""
        host = self.host(num_rows)
        self._pad(host, 0, 0)
        self.upload(num_rows)

    def _pad(self, host: dict[str, np.ndarray], start: int, num_new: int) -> None:
        """Make the rows from `start` on padding, and all but so many new entries of tables."""
        host["tokens"][start:] = host["positions"][start:] = 0
        host["slot_mapping"][start:] = host["row_seats"][start:] = host["row_slots"][start:] = -1
        host["new_places"][num_new:] = self._nowhere


@functools.cache
def _layout(num_rows: int) -> Layout:
    return Layout.of(
        {
            "tokens": (num_rows, torch.int64),
            "positions": (num_rows, torch.int64),
            "slot_mapping": (num_rows, torch.int64),
            "row_seats": (num_rows, torch.int32),
            "row_slots": (num_rows, torch.int32),
            "new_places": (num_rows, torch.int64),
            "new_blocks": (num_rows, torch.int32),
        }
    )
