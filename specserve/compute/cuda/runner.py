"""Scheduled sequences in, logits out, on CUDA: fills the step's device buffers and replays its graphs.

The counterpart of `ModelRunner` for `TritonDecoder`. A step is two parts: the layers over all rows, and the lm_head
over the rows that need logits; each is a CUDA graph by bucket (`graph_cache`). Buckets are padded rows, rows a tile of
attention, and places for adapters' segments. Everything else is data: sequence lengths, block tables, which adapter a
row has. Rows stand in the order of slots (`slots.py`).
Nothing here waits for the device; results are views of static buffers, good until the next step.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from ...adapters.lora import GROUPS, LoraAdapter
from ...errors import UserError
from ...kernels.lora_tiles import TILE_ROWS as LORA_TILE_ROWS
from ...kernels.ragged_attention import attention_scratch, choose_splits, split_len_for
from ...kernels.tiles import build_tiles_, max_tiles
from ...schedule.logits_rows import LogitsRows
from ...schedule.scheduler import ScheduledSequence
from ..kv_cache import KVCache
from ..runner import StepOutput
from ..slots import slot_of, take_slots
from .buffers import Layout, Page
from .decoder import RowInputs, TritonDecoder
from .graph_cache import GraphCache
from .lora import EMBEDDING, LM_HEAD, DeviceAdapterSlots, DeviceLoraBatch
from .seats import Seats

logger = logging.getLogger(__name__)

ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
MAX_ROWS = 8192  # one program finds the tiles of all rows
_EAGER_STEP = 64  # rows of larger steps are padded to a multiple of this
_ADAPTER_BUCKETS = (8, 64)  # segments of adapters that a graph has places for; beyond: as many as there are rows
_FEW_ROWS = (1, 4, 16)  # rows a tile of attention
_MOST_FOLDED = 128  # query heads times rows of the largest tile


@dataclass(frozen=True, slots=True)
class _Bucket:
    """What the launches of the layers depend on."""

    num_rows: int
    tile_rows: int
    num_segments: int  # of adapters; 0: no row has one
    lora_groups: frozenset[str]  # what adapters target


def padded(num_rows: int) -> int:
    """The bucket of `num_rows` rows."""
    if num_rows > ROW_BUCKETS[-1]:
        return -(-num_rows // _EAGER_STEP) * _EAGER_STEP
    return ROW_BUCKETS[bisect_left(ROW_BUCKETS, num_rows)]


class DeviceRunner:
    """Runs one forward over whatever was scheduled: at most `max_rows` rows of `max_seqs` sequences.

    Raises `UserError` for more rows than the kernels take.
    """

    def __init__(
        self,
        decoder: TritonDecoder,
        kv: KVCache,
        block_size: int,
        *,
        max_rows: int,
        max_seqs: int,
        max_model_len: int,
        max_adapters: int,
        max_lora_rank: int,
        cuda_graphs: bool,
    ):
        config, device = decoder.config, decoder.device
        self.decoder, self.kv, self.block_size = decoder, kv, block_size
        if max_rows > MAX_ROWS:
            raise UserError(
                f"max_batched_tokens={max_rows} is more than the {MAX_ROWS} rows that a step may have on CUDA",
                param="max_batched_tokens",
            )
        self.max_rows = padded(max_rows)
        self.slots = DeviceAdapterSlots(
            config, device, max_adapters, self.max_rows, dtype=decoder.compute_dtype, max_rank=max_lora_rank
        )
        self.graphs = GraphCache(device, cuda_graphs)
        self.seats = Seats(max_seqs, -(-max_model_len // block_size) + 1, device)
        self._max_seqs = max_seqs
        self._group_size = config.num_heads // config.num_kv_heads
        largest = max(_FEW_ROWS[-1], _MOST_FOLDED // self._group_size)
        self._tile_rows = (*_FEW_ROWS, largest) if largest > _FEW_ROWS[-1] else _FEW_ROWS
        is_cuda = device.type == "cuda"
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 2
        num_rows, hidden = self.max_rows, config.hidden_size
        self._rows_page = Page(_row_layout(num_rows).num_bytes, device)
        self._logits_page = Page(_logits_layout(num_rows).num_bytes, device)
        self._attention_tiles = torch.empty(num_rows, 3, dtype=torch.int32, device=device)
        self._lora_tiles = torch.empty(num_rows, 3, dtype=torch.int32, device=device)
        self._logits_tiles = torch.empty(num_rows, 3, dtype=torch.int32, device=device)
        self._residual = torch.zeros(num_rows, hidden, dtype=torch.float32, device=device)
        self._hidden = torch.zeros(num_rows, hidden, dtype=decoder.compute_dtype, device=device)
        self._tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.tap_layers = (config.num_layers // 2,)  # what heads read unless they were trained otherwise
        self._taps = torch.zeros(len(self.tap_layers), *self._hidden.shape, dtype=self._hidden.dtype, device=device)
        num_logits = min(num_rows, ROW_BUCKETS[-1])
        self._logits = torch.zeros(num_logits, config.vocab_size, dtype=torch.float32, device=device)
        self.padded_logits = self._logits[:0]  # of the latest step, with its bucket's padding
        self.logits_reason: str | None = None  # why that step's logits are in no graph's buffers
        # Of the rows with logits: their tokens, hidden states [L, H], and tapped layers' outputs [taps, L, H].
        self.picked_tokens = torch.zeros(num_logits, dtype=torch.int64, device=device)
        self.picked_hidden = torch.zeros(num_logits, hidden, dtype=decoder.compute_dtype, device=device)
        self.picked_taps = self._taps.new_zeros(self._taps.shape[0], num_logits, hidden)
        self.on_seated: Callable[[Seq[ScheduledSequence], Seq[int]], None] = lambda items, seats: None
        self._scratch: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor] | None] = {}

    @torch.inference_mode()
    def run(self, items: Seq[ScheduledSequence], adapters: dict[str, LoraAdapter]) -> StepOutput:
        """Queue one forward over `items`; `adapters` holds every adapter that they name, by content hash."""
        items, active = take_slots(self.slots, items, adapters)
        needed, slots = self._run_layers(items, len(active))
        if not needed.rows:  # nothing but unfinished prefill chunks
            return StepOutput(self._logits[:0], [], [], self.picked_hidden[:0], {})
        logits, hidden = self._run_logits(needed.rows, slots)
        return StepOutput(logits, needed.groups, needed.prompt_rows, hidden, {})

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the graphs of every bucket that decodes and verifications use; larger tiles are captured when met."""
        if not self.graphs.is_enabled:
            return
        for num_rows in reversed(ROW_BUCKETS):
            if num_rows > self.max_rows:
                continue
            self._upload_padding(num_rows)
            places = {self._segment_places(n, num_rows) for n in (0, 1, *_ADAPTER_BUCKETS, num_rows)}
            for tile_rows in (rows for rows in _FEW_ROWS if rows <= num_rows):
                for num_segments in sorted(places, reverse=True):
                    bucket = self._bucket(num_rows, tile_rows, num_segments)
                    self._replay(bucket, self._num_splits(bucket), None)
            self._run_logits([0] * num_rows, [-1] * num_rows)
        graphs = self.graphs
        logger.info(
            "captured %d CUDA graphs in %.1f s, %.0f MiB",
            graphs.num_graphs,
            graphs.capture_s,
            graphs.capture_bytes / 2**20,
        )

    # -- the layers

    def _run_layers(self, items: Seq[ScheduledSequence], num_active: int) -> tuple[LogitsRows, list[int]]:
        """Queue the layers; returns the rows that need logits and their adapters' slots."""
        counts = [item.num_rows + len(item.drafts) for item in items]
        num_rows, max_keys = sum(counts), max(i.seq.num_computed + n for i, n in zip(items, counts, strict=True))
        assert num_rows <= self.max_rows, (num_rows, self.max_rows)
        widest = max(counts)
        fitting = bisect_left(self._tile_rows, widest)
        bucket = self._bucket(
            padded(num_rows),
            self._tile_rows[min(fitting, len(self._tile_rows) - 1)],
            self._segment_places(num_active, padded(num_rows)),
        )
        num_splits = self._num_splits(bucket)
        layout = _row_layout(bucket.num_rows)
        host = self._rows_page.host(layout)
        seats = self.seats.seat([item.seq for item in items])
        self.on_seated(items, seats)
        logits, logits_slots = LogitsRows(), []
        start = 0
        for item, count, seat in zip(items, counts, seats, strict=True):
            slot = slot_of(self.slots, item)
            self._fill(host, item, start, count, seat, slot)
            logits_slots += [slot] * logits.add(item, start)
            start += count
        _pad(host, start)
        host["split_len"][0] = split_len_for(max_keys, num_splits)
        self._rows_page.upload(layout)
        reason = None
        if num_rows > ROW_BUCKETS[-1]:
            reason = f"it has more than {ROW_BUCKETS[-1]} rows"
        self._replay(bucket, num_splits, reason)
        return logits, logits_slots

    def _replay(self, bucket: _Bucket, num_splits: int, eager_reason: str | None) -> None:
        self.graphs.run(bucket, lambda: self._layers(bucket, num_splits), eager_reason)

    def _upload_padding(self, num_rows: int) -> None:
        """Inputs of a step of nothing but padding."""
        layout = _row_layout(num_rows)
        host = self._rows_page.host(layout)
        _pad(host, 0)
        host["split_len"][0] = split_len_for(1, 1)
        self._rows_page.upload(layout)

    def _layers(self, bucket: _Bucket, num_splits: int) -> None:
        """The launches of `bucket`."""
        num_rows = bucket.num_rows
        fields = self._rows_page.device(_row_layout(num_rows))
        tiles = self._attention_tiles[: self._num_tiles(bucket)]
        build_tiles_(tiles, fields["row_seats"], bucket.tile_rows)
        lora = None
        if bucket.num_segments:
            lora_tiles = self._lora_tiles[: max_tiles(num_rows, LORA_TILE_ROWS, bucket.num_segments)]
            build_tiles_(lora_tiles, fields["row_slots"], LORA_TILE_ROWS)
            lora = self._lora(lora_tiles, bucket.lora_groups)
        rows = RowInputs(
            tokens=fields["tokens"],
            positions=fields["positions"],
            slot_mapping=fields["slot_mapping"],
            tiles=tiles,
            tile_rows=bucket.tile_rows,
            block_tables=self.seats.tables,
            block_size=self.block_size,
            split_len=fields["split_len"],
            num_splits=num_splits,
            scratch=self._attention_scratch(num_splits, num_rows),
            lora=lora,
        )
        self._tokens[:num_rows].copy_(fields["tokens"])
        taps = dict(zip(self.tap_layers, self._taps[:, :num_rows].unbind(0), strict=True))
        self.decoder.forward_rows(rows, self.kv, self._residual[:num_rows], self._hidden[:num_rows], taps)

    def _fill(
        self, host: dict[str, np.ndarray], item: ScheduledSequence, start: int, count: int, seat: int, slot: int
    ) -> None:
        """The rows of one sequence."""
        seq, end, first = item.seq, start + count, item.seq.num_computed
        host["tokens"][start : start + item.num_rows] = seq.tokens[first : first + item.num_rows]
        if item.drafts:
            host["tokens"][start + item.num_rows : end] = item.drafts
        positions = np.arange(first, first + count)
        host["positions"][start:end] = positions
        first_block = first // self.block_size
        blocks = np.asarray(seq.block_table[first_block : (first + count - 1) // self.block_size + 1])
        where = positions - first_block * self.block_size
        host["slot_mapping"][start:end] = blocks[where // self.block_size] * self.block_size + where % self.block_size
        host["row_seats"][start:end] = seat
        host["row_slots"][start:end] = slot

    # -- the lm_head

    def _run_logits(self, rows: list[int], slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Queue logits and hidden states of `rows`."""
        num_logits, size = len(rows), padded(len(rows))
        layout = _logits_layout(size)
        host = self._logits_page.host(layout)
        host["rows"][:num_logits], host["rows"][num_logits:] = rows, 0
        host["slots"][:num_logits], host["slots"][num_logits:] = slots, -1
        self._logits_page.upload(layout)
        if size > self._logits.shape[0]:  # log-probabilities of long prompts
            logits = torch.empty(size, self._logits.shape[1], dtype=torch.float32, device=self._logits.device)
            picked = self._hidden.new_empty(size, self._hidden.shape[1])
        else:
            logits, picked = self._logits[:size], self.picked_hidden[:size]
        with_lora = LM_HEAD in self.slots.targeted_groups and max(slots) >= 0
        reason = f"it needs more than {self._logits.shape[0]} rows of logits" if size > self._logits.shape[0] else None
        self.padded_logits, self.logits_reason = logits, reason
        self.graphs.run(
            ("logits", size, with_lora), lambda: self._logits_part(layout, logits, picked, with_lora), reason
        )
        return logits[:num_logits], picked[:num_logits]

    def _logits_part(
        self,
        layout: Layout,
        logits: torch.Tensor,
        picked: torch.Tensor,
        with_lora: bool,
    ) -> None:
        fields = self._logits_page.device(layout)
        torch.index_select(self._hidden, 0, fields["rows"], out=picked)
        size = picked.shape[0]
        if size <= self.picked_tokens.shape[0]:
            torch.index_select(self._tokens, 0, fields["rows"], out=self.picked_tokens[:size])
            for idx in range(len(self.tap_layers)):
                torch.index_select(self._taps[idx], 0, fields["rows"], out=self.picked_taps[idx, :size])
        lora = None
        if with_lora:
            tiles = self._logits_tiles[: max_tiles(size, LORA_TILE_ROWS, size)]
            build_tiles_(tiles, fields["slots"], LORA_TILE_ROWS)
            lora = self._lora(tiles, frozenset((LM_HEAD,)))
        self.decoder.logits_into(picked, logits, lora)

    # -- buckets

    def _lora(self, tiles: torch.Tensor, groups: frozenset[str]) -> DeviceLoraBatch:
        """The LoRA of rows or logits in `tiles`; each asks for its own part of `groups` only."""
        scratch = self.slots.scratch
        return DeviceLoraBatch(self.slots, tiles, tiles, EMBEDDING in groups, LM_HEAD in groups, scratch, groups)

    def _bucket(self, num_rows: int, tile_rows: int, num_segments: int) -> _Bucket:
        groups = self._groups() if num_segments else frozenset()
        return _Bucket(num_rows, tile_rows, num_segments, groups)

    def _groups(self) -> frozenset[str]:
        """What graphs launch LoRA for: attention's inputs where nothing else is targeted, else all linears, so that
        few sets of graphs serve any adapters."""
        targeted = self.slots.targeted_groups
        if targeted and targeted <= {"qkv"}:
            return targeted
        return frozenset(GROUPS) | (targeted & {EMBEDDING})

    def _segment_places(self, num_active: int, num_rows: int) -> int:
        if not num_active:
            return 0
        return next((n for n in _ADAPTER_BUCKETS if num_active <= n < num_rows), num_rows)

    def _num_tiles(self, bucket: _Bucket) -> int:
        return min(bucket.num_rows, max_tiles(bucket.num_rows, bucket.tile_rows, self._max_seqs))

    def _num_splits(self, bucket: _Bucket) -> int:
        return choose_splits(self._num_tiles(bucket), self.decoder.config.num_kv_heads, self._num_sms)

    def _attention_scratch(self, num_splits: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        key = num_splits, num_rows
        if key not in self._scratch:
            config = self.decoder.config
            self._scratch[key] = attention_scratch(
                num_splits, num_rows, config.num_heads, config.head_dim, self.decoder.device
            )
        return self._scratch[key]


def _pad(host: dict[str, np.ndarray], start: int) -> None:
    """Make the rows from `start` on padding: they read token 0 and write nothing."""
    host["tokens"][start:] = host["positions"][start:] = 0
    host["slot_mapping"][start:] = host["row_seats"][start:] = host["row_slots"][start:] = -1


def _row_layout(num_rows: int) -> Layout:
    return Layout.of(
        {
            "tokens": (num_rows, torch.int64),
            "positions": (num_rows, torch.int64),
            "slot_mapping": (num_rows, torch.int64),
            "row_seats": (num_rows, torch.int32),
            "row_slots": (num_rows, torch.int32),
            "split_len": (1, torch.int32),
        }
    )


def _logits_layout(num_rows: int) -> Layout:
    return Layout.of({"rows": (num_rows, torch.int64), "slots": (num_rows, torch.int32)})
