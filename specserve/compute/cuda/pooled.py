"""Adds up the hidden states of pooled rows on the device, behind the layers and outside of their graphs.

What a text's rows of earlier steps came to lies on a place that it holds from its first such rows to its last; a place
is taken from texts that run no more, so that there is always one. What ended comes to the host in one copy, to be read
before the next but one is queued.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Seq

import numpy as np
import torch

from ...kernels.pooled_rows import pool_rows_
from ...schedule.pooled_rows import PooledSpan
from ...schedule.sequence import Sequence, Status
from ..step_output import PooledOutput
from .buckets import padded
from .buffers import HostPage, Layout, Page

_FIELDS = 6  # of a span


class PooledPart:
    """Of up to `num_texts` texts that run, over rows of `hidden` [T, H]."""

    def __init__(self, hidden: torch.Tensor, num_texts: int):
        device, self._hidden = hidden.device, hidden
        self._size = hidden.shape[1]
        self._layout = Layout.of({"values": (num_texts * self._size, torch.float32)})
        self._results = torch.zeros(self._layout.num_bytes, dtype=torch.uint8, device=device)
        self._out = self._layout.views(self._results)["values"].view(num_texts, self._size)
        self._copies = [HostPage(self._layout.num_bytes, device) for _ in range(2)]
        self._sums = torch.zeros(num_texts, self._size, dtype=torch.float64, device=device)
        self._page = Page(_spans(padded(num_texts)).num_bytes, device)
        self._holders: list[Sequence | None] = [None] * num_texts  # by place
        self._free = [*range(num_texts)]

    def queue(self, spans: Seq[PooledSpan]) -> PooledOutput | None:
        """Queue the sums of `spans`, those that end first; None where none does."""
        places = [self._place(span) for span in spans]
        entries = [
            (span.first_row, span.num_rows, span.position, place, span.goes_on, span.is_weighted)
            for span, place in zip(spans, places, strict=True)
        ]
        self._launch(np.array(entries, np.int32), np.array([span.total for span in spans], np.float64))
        ended = [span.item for span in spans if span.total]
        for place in places[: len(ended)]:
            self._free_place(place)
        if not ended:
            return None
        copy = self._copies[0]
        self._copies.reverse()
        copy.copy_from(self._results, len(ended) * self._size * self._out.itemsize)
        return PooledOutput(ended, functools.partial(self._read, copy, len(ended)))

    def warm_up(self) -> None:
        """Compile the kernel, over rows that nobody reads."""
        self._launch(np.array([[0, 1, 0, 0, 0, 0]], np.int32), np.ones(1))

    def _launch(self, entries: np.ndarray, totals: np.ndarray) -> None:
        num = len(entries)
        layout = _spans(padded(num))
        host, fields = self._page.host(layout), self._page.device(layout)
        host["spans"][: num * _FIELDS], host["totals"][:num] = entries.ravel(), totals
        self._page.upload(layout)
        spans = fields["spans"].view(-1, _FIELDS)[:num]
        pool_rows_(self._out, self._sums, self._hidden, spans, fields["totals"][:num])

    def _read(self, copy: HostPage, num: int) -> np.ndarray:
        """[num, H] float32, once the copy is done."""
        values = copy.fields(self._layout)["values"]  # sync: the step's tokens are waited for, too
        return values[: num * self._size].reshape(num, self._size)

    def _place(self, span: PooledSpan) -> int:
        seq = span.item.seq
        place = seq.pooled_sum
        if place is not None and self._holders[place] is seq:
            return place
        assert not span.goes_on, "the sums of a text were lost"
        if not self._free:
            for held, holder in enumerate(self._holders):
                if holder is not None and holder.status is not Status.RUNNING:
                    self._free_place(held)
        seq.pooled_sum = place = self._free.pop()
        self._holders[place] = seq
        return place

    def _free_place(self, place: int) -> None:
        self._holders[place] = None
        self._free.append(place)


@functools.cache
def _spans(num: int) -> Layout:
    return Layout.of({"spans": (num * _FIELDS, torch.int32), "totals": (num, torch.float64)})
