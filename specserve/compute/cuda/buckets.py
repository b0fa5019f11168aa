"""The padded sizes of a step on CUDA: what its launches depend on, so that one graph serves every step of a bucket.

A bucket is padded rows, rows a tile of attention, places for adapters' segments, and what these adapters target. All
else is data: sequence lengths, block tables, which adapter a row has. Steps beyond the largest bucket have sizes as
well, but no graph.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...kernels.ragged_attention import choose_splits
from ...kernels.tiles import max_tiles
from ...model.config import ModelConfig
from ..decoder_weights import GROUPS
from .lora import EMBEDDING, DeviceAdapterSlots

ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_EAGER_STEP = 64  # rows of larger steps are padded to a multiple of this
_ADAPTER_BUCKETS = (8, 64)  # segments of adapters that a graph has places for; beyond: as many as there are rows
_FEW_ROWS = (1, 4, 16)  # rows a tile of attention
_MOST_FOLDED = 128  # query heads times rows of the largest tile


@dataclass(frozen=True, slots=True)
class Bucket:
    """What the launches of the layers depend on."""

    num_rows: int
    tile_rows: int
    num_segments: int  # of adapters; 0: no row has one
    lora_groups: frozenset[str]  # what adapters target


def padded(num_rows: int) -> int:
    """The bucket of `num_rows` rows."""
    if num_rows > most_rows():
        return -(-num_rows // _EAGER_STEP) * _EAGER_STEP
    return ROW_BUCKETS[bisect_left(ROW_BUCKETS, num_rows)]


def most_rows() -> int:
    """Rows of the largest bucket; a step, or a step's logits, of more has no graph."""
    return ROW_BUCKETS[-1]


def captured_rows(max_rows: int) -> list[int]:
    """The padded rows that graphs are captured for at start, largest first, so that smaller ones fit their memory."""
    return [num_rows for num_rows in reversed(ROW_BUCKETS) if num_rows <= max_rows]


class Buckets:
    """Chooses the buckets of a model on a device, for steps of up to `max_seqs` sequences."""

    def __init__(self, config: ModelConfig, device: torch.device, slots: DeviceAdapterSlots, max_seqs: int):
        self._slots, self._max_seqs, self._num_kv_heads = slots, max_seqs, config.num_kv_heads
        largest = max(_FEW_ROWS[-1], _MOST_FOLDED // (config.num_heads // config.num_kv_heads))
        self._tile_rows = (*_FEW_ROWS, largest) if largest > _FEW_ROWS[-1] else _FEW_ROWS
        is_cuda = device.type == "cuda"
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 2

    def of(self, num_rows: int, widest: int, num_active: int) -> Bucket:
        """The bucket of a step: `widest` rows of one sequence at most, `num_active` adapters."""
        size = padded(num_rows)
        fitting = bisect_left(self._tile_rows, widest)
        tile_rows = self._tile_rows[min(fitting, len(self._tile_rows) - 1)]
        return self._bucket(size, tile_rows, _segment_places(num_active, size))

    def captured(self, num_rows: int) -> Iterator[Bucket]:
        """What decodes and verifications of `num_rows` padded rows use; larger tiles are captured when met."""
        places = {_segment_places(n, num_rows) for n in (0, 1, *_ADAPTER_BUCKETS, num_rows)}
        for tile_rows in (rows for rows in _FEW_ROWS if rows <= num_rows):
            for num_segments in sorted(places, reverse=True):
                yield self._bucket(num_rows, tile_rows, num_segments)

    def num_tiles(self, bucket: Bucket) -> int:
        """Places for tiles of attention."""
        return min(bucket.num_rows, max_tiles(bucket.num_rows, bucket.tile_rows, self._max_seqs))

    def num_splits(self, bucket: Bucket) -> int:
        """Splits of attention's keys."""
        return choose_splits(self.num_tiles(bucket), self._num_kv_heads, self._num_sms)

    def _bucket(self, num_rows: int, tile_rows: int, num_segments: int) -> Bucket:
        return Bucket(num_rows, tile_rows, num_segments, self._groups() if num_segments else frozenset())

    def _groups(self) -> frozenset[str]:
        """What graphs launch LoRA for: attention's inputs where nothing else is targeted, else all linears, so that
        few sets of graphs serve any adapters."""
        targeted = self._slots.targeted_groups
        if targeted and targeted <= {"qkv"}:
            return targeted
        return frozenset(GROUPS) | (targeted & {EMBEDDING})


def _segment_places(num_active: int, num_rows: int) -> int:
    if not num_active:
        return 0
    return next((n for n in _ADAPTER_BUCKETS if num_active <= n < num_rows), num_rows)
