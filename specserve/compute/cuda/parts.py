"""What a step on CUDA is made of, built in the order in which one part reads the other.

Inputs, layers and logits are queued by `DeviceRunner`; sampling (`DeviceSampler`) and drafts (`DeviceDrafts`) read what
logits leave behind. All of them share the graphs, the seats of sequences and the slots of adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import UserError
from ..kv_cache import KVCache
from ..path import StepLimits
from .buckets import Buckets, most_logits, most_rows, padded
from .decoder import TritonDecoder
from .graph_cache import GraphCache
from .layers import LayersPart
from .logits import LogitsPart
from .lora import DeviceAdapterSlots
from .pooled import PooledPart
from .rows import StepRows
from .sampled_tokens import SampledTokens
from .seats import Seats


@dataclass(frozen=True, slots=True)
class DeviceParts:
    """The parts that a step's two forwards, layers and logits, consist of, and what is pooled beside the logits."""

    decoder: TritonDecoder
    max_rows: int  # padded
    slots: DeviceAdapterSlots
    graphs: GraphCache
    seats: Seats
    buckets: Buckets
    rows: StepRows
    sampled: SampledTokens
    layers: LayersPart
    logits: LogitsPart
    pooled: PooledPart

    @classmethod
    def of(cls, decoder: TritonDecoder, kv: KVCache, limits: StepLimits, graphs: GraphCache) -> DeviceParts:
        """For steps within `limits`. Raises `UserError` for more rows than the kernels take."""
        config, device = decoder.config, decoder.device
        if limits.max_rows > most_rows():  # one program finds the tiles of all rows
            raise UserError(
                f"max_batched_tokens={limits.max_rows} is more than the {most_rows()} rows of a step on CUDA",
                param="max_batched_tokens",
            )
        max_rows = padded(limits.max_rows)
        slots = DeviceAdapterSlots(
            config,
            device,
            limits.max_adapters,
            max_rows,
            dtype=decoder.compute_dtype,
            max_rank=limits.max_lora_rank,
        )
        seats = Seats(limits.max_seqs, -(-limits.max_model_len // kv.block_size) + 1, device)
        buckets = Buckets(config, device, slots, limits.max_seqs)
        rows = StepRows(max_rows, kv.block_size, seats.nowhere, device)
        sampled = SampledTokens(most_logits(max_rows, config.vocab_size), device)
        layers = LayersPart(
            decoder, kv, rows, sampled.tokens, seats, slots, buckets, graphs, max_rows, limits.max_model_len
        )
        logits = LogitsPart(decoder, layers, slots, graphs, sampled.num_rows)
        pooled = PooledPart(layers.hidden, limits.max_seqs)
        return cls(decoder, max_rows, slots, graphs, seats, buckets, rows, sampled, layers, logits, pooled)
