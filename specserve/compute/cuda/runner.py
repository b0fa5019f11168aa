"""Scheduled sequences in, logits out, on CUDA: fills the step's device buffers and replays its graphs.

The counterpart of `ModelRunner` for `TritonDecoder`. A step is two parts, the layers over all rows and the lm_head over
the rows that need logits; each is a CUDA graph by bucket. Rows stand in the order of slots (`compute/slots.py`).
Nothing here waits for the device; results are views of static buffers, good until the next step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq

import numpy as np
import torch

from ...adapters.lora import LoraAdapter
from ...schedule.logits_rows import LogitsRows
from ...schedule.pooled_rows import pooled_spans
from ...schedule.scheduler import ScheduledSequence
from ..row_lists import RowLists
from ..slots import take_slots
from ..step_output import StepOutput
from .buckets import Bucket, padded_up_to
from .parts import DeviceParts

logger = logging.getLogger(__name__)


class DeviceRunner:
    """Runs one forward over whatever was scheduled, within the limits that `parts` were made for.

    `on_seated` gets a step's items, their seats and the positions behind their rows when its layers are queued.
    """

    def __init__(
        self,
        parts: DeviceParts,
        on_seated: Callable[[Seq[ScheduledSequence], np.ndarray, np.ndarray], None] = lambda items, seats, ends: None,
    ):
        self._parts, self._on_seated = parts, on_seated
        self.slots, self.graphs = parts.slots, parts.graphs

    @torch.inference_mode()
    def forward(self, items: Seq[ScheduledSequence], adapters: Mapping[str, LoraAdapter]) -> StepOutput:
        """Queue one forward over `items`; `adapters` holds every adapter that they name, by content hash."""
        items, slots, active = take_slots(self.slots, items, adapters)
        counts = [item.num_rows + len(item.drafts) for item in items]
        num_rows = sum(counts)
        assert num_rows <= self._parts.max_rows, (num_rows, self._parts.max_rows)
        bucket = self._parts.layers.bucket_of(num_rows, max(counts), len(active))
        seats, row_slots, ends = self._upload(items, counts, slots, bucket)
        self._parts.layers.queue(bucket)
        self._parts.seats.wrote_new()
        self._on_seated(items, seats, ends)
        needed, spans = LogitsRows(items, counts), pooled_spans(items, counts)  # while the layers run
        if needed.rows:
            rows = np.array(needed.rows)
            logits, hidden = self._parts.logits.queue(rows, row_slots[rows])
        else:  # nothing but unfinished prefill chunks, and texts that are pooled
            logits, hidden = self._parts.logits.nothing
        pooled = self._parts.pooled.queue(spans) if spans else None  # at last: it keeps the sums
        return StepOutput(logits, needed.groups, needed.items, needed.prompt_rows, hidden, {}, pooled)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture graphs that serve any step; those that fit better follow when they are missed (`LayersPart`)."""
        parts, graphs = self._parts, self.graphs
        if not graphs.is_enabled:
            return
        for bucket in parts.buckets.first(parts.max_rows):
            parts.layers.capture(bucket)
        for num_rows in padded_up_to(parts.sampled.num_rows):
            parts.logits.queue([0] * num_rows, [-1] * num_rows)
        parts.pooled.warm_up()
        logger.info(
            "captured %d CUDA graphs in %.1f s, %.0f MiB",
            graphs.num_graphs,
            graphs.capture_s,
            graphs.capture_bytes / 2**20,
        )

    def _upload(
        self, items: Seq[ScheduledSequence], counts: Seq[int], slots: Seq[int], bucket: Bucket
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bring the rows of `items` and their blocks to the device.

        Returns the items' seats [S], their rows' slots [T] and the positions behind their rows [S].
        """
        parts = self._parts
        host = parts.rows.host(bucket.num_rows)
        seats, rows = parts.seats.seat([item.seq for item in items]), RowLists.of(items, counts)
        row_slots = np.array(slots)[rows.items]
        parts.rows.fill(host, rows, parts.seats, seats[rows.items], row_slots)
        parts.rows.upload(bucket.num_rows)
        return seats, row_slots, rows.ends
