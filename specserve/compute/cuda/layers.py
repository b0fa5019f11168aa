"""A step's layers over all of its rows, as one graph by bucket; what they leave behind lies in static buffers.

Tiles of attention and of LoRA are cut on the device, from the rows that `StepRows` brought there. Owns these tiles,
attention's scratch and the outputs: every row's hidden state, its token and the layers that heads read. A step whose
bucket has no graph yet is served by a larger one; if that happens often, its own is captured between two steps.
"""

from __future__ import annotations

import logging
import time
from collections import Counter

import torch

from ...kernels.linear_fused import MOST_FUSED_ROWS
from ...kernels.ragged_attention import MOST_JOINED, attention_scratch, choose_split_len
from ...kernels.tiles import build_tiles_
from ..kv_cache import KVCache
from .buckets import Bucket, Buckets
from .decoder import RowInputs, TritonDecoder
from .graph_cache import GraphCache
from .lora import DeviceAdapterSlots
from .rows import StepRows
from .seats import Seats

logger = logging.getLogger(__name__)

_MISSES = 8  # of a bucket before its graph is captured
_MOST_CAPTURING = 0.1  # of the time


class LayersPart:
    """The layers of `decoder` over up to `max_rows` rows of sequences of up to `max_model_len` tokens.

    `sampled` [L] int64 are the tokens of the step before, which a row may name by its place there: token -1 - i is
    sampled[i]. `seats` has the sequences' blocks; those that are new with the rows are put there first.
    """

    def __init__(
        self,
        decoder: TritonDecoder,
        kv: KVCache,
        rows: StepRows,
        sampled: torch.Tensor,
        seats: Seats,
        slots: DeviceAdapterSlots,
        buckets: Buckets,
        graphs: GraphCache,
        max_rows: int,
        max_model_len: int,
    ):
        config, device, dtype = decoder.config, decoder.device, decoder.compute_dtype
        self._decoder, self._kv, self._rows, self._seats = decoder, kv, rows, seats
        self._sampled = sampled
        self._slots, self._buckets, self._graphs = slots, buckets, graphs
        self._attention_tiles = torch.empty(max_rows, 3, dtype=torch.int32, device=device)
        self._lora_blocks = slots.new_blocks(max_rows)
        self._residual = torch.zeros(max_rows, config.hidden_size, dtype=torch.float32, device=device)
        self._split_len = choose_split_len(max_model_len)
        shared_rows = buckets.most_shared(max_rows)
        self._scratch = attention_scratch(shared_rows, config.num_heads, config.head_dim, device)
        self._arrived = torch.zeros(shared_rows * config.num_kv_heads, dtype=torch.int32, device=device)
        self._stand_ins: dict[Bucket, Bucket] = {}  # captured, of buckets that are not
        self._missed: Counter[Bucket] = Counter()
        self._refused: set[Bucket] = set()  # whose capture failed
        self._rest_until = 0.0  # time.perf_counter(), before the next capture
        self.tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self.hidden = torch.zeros(max_rows, config.hidden_size, dtype=dtype, device=device)  # [T, H], normed
        self.tap_layers = (config.num_layers // 2,)  # what heads read unless they were trained otherwise
        self.taps = self.hidden.new_zeros(len(self.tap_layers), *self.hidden.shape)  # [taps, T, H]

    def bucket_of(self, num_rows: int, widest: int, num_active: int) -> Bucket:
        """What serves a step of so many rows, `widest` of one sequence at most, and `num_active` adapters.

        Its own bucket, or as long as that has no graph, the smallest that has one.
        """
        own = self._buckets.of(num_rows, widest, num_active)
        if not self._graphs.is_enabled or self._graphs.has(own):
            return own
        stand_in = self._stand_ins.get(own)
        if stand_in is None:
            serving = [b for b in self._graphs.captured() if isinstance(b, Bucket) and b.serves(own)]
            if not serving:
                return own  # captured now, if that was not tried
            nearest = min(serving, key=lambda b: (b.num_rows, b.num_segments, abs(b.tile_rows - own.tile_rows)))
            stand_in = self._stand_ins[own] = nearest
        if own not in self._graphs and own not in self._refused:
            self._missed[own] += 1
        return stand_in

    def queue(self, bucket: Bucket) -> None:
        """Queue the layers over the rows that were uploaded last."""
        self._graphs.launch(bucket, lambda: self._launch(bucket))

    def capture(self, bucket: Bucket) -> None:
        """Queue the layers over padding, which captures the bucket's graph; whatever was queued reads no row of it."""
        self._rows.upload_padding(bucket.num_rows)
        self.queue(bucket)
        self._stand_ins.clear()

    @torch.inference_mode()
    def capture_missed(self) -> None:
        """Capture the bucket that is missed most, if any is often, and not all the time."""
        start = time.perf_counter()
        if not self._missed or start < self._rest_until:
            return
        bucket, misses = self._missed.most_common(1)[0]
        if misses >= _MISSES and self._graphs.has_room:
            del self._missed[bucket]
            try:
                self.capture(bucket)
            except Exception:  # mostly for want of memory; it would only have made steps faster
                self._refused.add(bucket)
                logger.exception("no CUDA graph could be captured for %s; a larger one goes on serving it", bucket)
            now = time.perf_counter()
            self._rest_until = now + (now - start) / _MOST_CAPTURING

    def _joins(self, bucket: Bucket) -> bool:
        """Whether the last program of a tile of attention joins its splits: it is the quicker way for few rows."""
        config = self._decoder.config
        folded = bucket.tile_rows * (config.num_heads // config.num_kv_heads)
        return bucket.num_rows <= MOST_FUSED_ROWS or folded <= MOST_JOINED

    def _launch(self, bucket: Bucket) -> None:
        num_rows, num_programs = bucket.num_rows, self._buckets.num_programs(bucket)
        fields = self._rows.device(num_rows)
        self._seats.flat.index_copy_(0, fields["new_places"], fields["new_blocks"])
        tiles = self._attention_tiles[: self._buckets.num_tiles(bucket)]
        build_tiles_(tiles, fields["row_seats"], bucket.tile_rows)
        lora = None
        if bucket.num_segments:
            lora = self._slots.launches(self._lora_blocks, fields["row_slots"], bucket.num_segments, bucket.lora_groups)
        named, tokens = fields["tokens"], self.tokens[:num_rows]
        place = (-1 - named).clamp_(min=0, max=self._sampled.shape[0] - 1)
        torch.where(named < 0, self._sampled[place], named, out=tokens)
        rows = RowInputs(
            tokens=tokens,
            positions=fields["positions"],
            slot_mapping=fields["slot_mapping"],
            tiles=tiles,
            tile_rows=bucket.tile_rows,
            block_tables=self._seats.tables,
            block_size=self._rows.block_size,
            split_len=self._split_len,
            num_programs=num_programs,
            scratch=self._scratch,
            arrived=self._arrived if num_programs > 1 and self._joins(bucket) else None,
            lora=lora,
        )
        taps = dict(zip(self.tap_layers, self.taps[:, :num_rows].unbind(0), strict=True))
        self._decoder.forward_rows(rows, self._kv, self._residual[:num_rows], self.hidden[:num_rows], taps)
