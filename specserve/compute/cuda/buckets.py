"""The padded sizes of a step on CUDA: what its launches depend on, so that one graph serves every step of a bucket.

A bucket is padded rows, rows a tile of attention, places for adapters' segments, and what these adapters target. All
else is data: sequence lengths, block tables, which adapter a row has. A larger bucket serves a smaller step as well,
slower; so few are captured at start, and the others when they are missed (`layers.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...kernels.device_limits import shared_bytes
from ...kernels.ragged_attention import choose_programs, largest_tile_rows, scratch_row_bytes
from ...kernels.tiles import max_tiles
from ...model.config import ModelConfig
from ..decoder_weights import GROUPS
from .lora import EMBEDDING, DeviceAdapterSlots

# At most a third of a step of 16 rows and more is padding.
ROW_BUCKETS = (
    1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560,
    3072, 4096, 5120, 6144, 8192,
)  # fmt: skip
_FIRST_ROWS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192)  # captured at start
_LOGITS_BYTES = 1 << 29  # of the buffer of logits; a step that needs more rows has no graph for them
_ADAPTER_BUCKETS = (8, 64)  # segments of adapters that a graph has places for; beyond: as many as there are rows
_FEW_ROWS = (1, 4, 16)  # rows a tile of attention, where no sequence has more


@dataclass(frozen=True, slots=True)
class Bucket:
    """What the launches of the layers depend on."""

    num_rows: int
    tile_rows: int
    num_segments: int  # of adapters; 0: no row has one
    lora_groups: frozenset[str]  # what adapters target

    def serves(self, other: Bucket) -> bool:
        """Whether its launches are right for a step of bucket `other`, too; rows a tile change no result."""
        return (
            self.num_rows >= other.num_rows
            and self.num_segments >= other.num_segments
            and (not other.num_segments or self.lora_groups >= other.lora_groups)
        )


def padded(num_rows: int) -> int:
    """The bucket of `num_rows` rows, at most `most_rows()`."""
    return ROW_BUCKETS[bisect_left(ROW_BUCKETS, num_rows)]


def most_rows() -> int:
    """Rows of the largest bucket."""
    return ROW_BUCKETS[-1]


def padded_up_to(max_rows: int) -> list[int]:
    """Padded rows up to `max_rows`, largest first, so that smaller graphs fit into their memory."""
    return [num_rows for num_rows in reversed(ROW_BUCKETS) if num_rows <= max_rows]


def most_logits(max_rows: int, vocab_size: int) -> int:
    """Rows of logits that steps of up to `max_rows` padded rows have a buffer for."""
    fitting = [num_rows for num_rows in ROW_BUCKETS if num_rows * vocab_size * 4 <= _LOGITS_BYTES]
    return min(max_rows, max(fitting, default=1))


class Buckets:
    """Chooses the buckets of a model on a device, for steps of up to `max_seqs` sequences."""

    def __init__(self, config: ModelConfig, device: torch.device, slots: DeviceAdapterSlots, max_seqs: int):
        self._slots, self._max_seqs, self._num_kv_heads = slots, max_seqs, config.num_kv_heads
        self._group, self._head_dim = config.num_heads // config.num_kv_heads, config.head_dim
        self._scratch_row_bytes = scratch_row_bytes(config.num_heads, config.head_dim)
        self._shared_bytes, is_cuda = shared_bytes(device), device.type == "cuda"
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 2

    def of(self, num_rows: int, widest: int, num_active: int) -> Bucket:
        """The bucket of a step: `widest` rows of one sequence at most, `num_active` adapters."""
        size = padded(num_rows)
        largest = self._largest(size)
        tile_rows = next((rows for rows in _FEW_ROWS if widest <= rows < largest), largest)
        return self._bucket(size, tile_rows, _segment_places(num_active, size))

    def first(self, max_rows: int) -> Iterator[Bucket]:
        """Buckets that serve any step of up to `max_rows` rows and few adapters, largest first."""
        for num_rows in sorted({*(n for n in _FIRST_ROWS if n < max_rows), max_rows}, reverse=True):
            largest = self._largest(num_rows)
            fitting = {rows for rows in (_FEW_ROWS[0], min(_FEW_ROWS[-1], largest), largest) if rows <= num_rows}
            for tile_rows in sorted(fitting):
                for num_segments in (_segment_places(1, num_rows), 0):
                    yield self._bucket(num_rows, tile_rows, num_segments)

    def num_tiles(self, bucket: Bucket) -> int:
        """Places for tiles of attention."""
        return min(bucket.num_rows, max_tiles(bucket.num_rows, bucket.tile_rows, self._max_seqs))

    def num_programs(self, bucket: Bucket) -> int:
        """Programs that share the splits of a tile of attention."""
        return choose_programs(
            self.num_tiles(bucket), self._num_kv_heads, self._num_sms, self._scratch_row_bytes, bucket.num_rows
        )

    def most_shared(self, max_rows: int) -> int:
        """Rows of the largest step whose tiles of attention several programs share."""
        widest = (self._bucket(num_rows, self._largest(num_rows), 0) for num_rows in padded_up_to(max_rows))
        return next((bucket.num_rows for bucket in widest if self.num_programs(bucket) > 1), 1)  # fewest tiles

    def _largest(self, num_rows: int) -> int:
        """Rows a tile of attention, where a sequence has many of the step's `num_rows`."""
        sizes = (self._group, self._head_dim, self._num_kv_heads)
        return largest_tile_rows(num_rows, *sizes, self._num_sms, self._shared_bytes)

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
