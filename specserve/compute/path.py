"""What runs an engine's steps: the parts that differ between torch, the native CPU path and CUDA, chosen once.

The engine knows a runner, a sampler and heads; which ones they are follows from the decoder that was loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ..adapters.lora import LoraAdapter
from ..config import EngineConfig
from ..drafters.head_native import NativeHeadRunner
from ..drafters.head_source import HeadRunner
from ..drafters.protocol import Heads, SteppedHeads
from ..messages import GenerateRequest, SamplingParams
from ..schedule.block_manager import BlockManager
from ..schedule.scheduler import ScheduledSequence
from ..schedule.sequence import Sequence
from .cuda.decoder import TritonDecoder
from .cuda.drafts import DeviceDrafts
from .cuda.runner import DeviceRunner
from .cuda.sampler import DeviceSampler
from .grammar_masks import MaskMaker
from .kv_cache import KVCache
from .native.decoder import NativeDecoder, one_torch_thread
from .runner import ModelRunner
from .sampler import Sampler
from .torch.decoder import Decoder


@dataclass(frozen=True, slots=True)
class ComputePath:
    """The parts of a step that compute."""

    runner: ModelRunner | DeviceRunner
    sampler: Sampler
    heads: Heads
    stepped_heads: SteppedHeads | None  # the same, where the host asks them for each position
    torch_threads: Callable[[], AbstractContextManager[None]]  # around whatever computes
    is_asynchronous: bool  # the device runs by itself while the host goes on

    def seconds(
        self, blocks: BlockManager, max_model_len: int, num_rows: int, num_seqs: int = 1, context_len: int = 0
    ) -> float:
        """Seconds of a forward over scratch state, rows split evenly over sequences of `context_len` keys; warms up."""
        num_seqs = min(num_seqs, blocks.num_blocks)
        room = min(max_model_len, blocks.num_blocks // num_seqs * blocks.block_size)
        rows_each = max(1, min(num_rows // num_seqs, room - 1))
        context_len = min(context_len, room - rows_each)
        items = []
        for seq_id in range(num_seqs):
            request = GenerateRequest("warm-up", [0] * (context_len + 1), SamplingParams(max_tokens=1))
            seq = Sequence(seq_id, request)
            seq.num_computed = context_len
            blocks.reserve(seq.block_table, context_len + rows_each)
            items.append(ScheduledSequence(seq, 1, [0] * (rows_each - 1)))
        start = time.perf_counter()
        with self.torch_threads():
            self.runner.run(items, {})
        if self.is_asynchronous:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        for item in items:
            blocks.release(item.seq.block_table)
        return seconds


def make_path(
    config: EngineConfig,
    decoder: Decoder | NativeDecoder | TritonDecoder,
    kv: KVCache,
    max_rows: int,
    max_seqs: int,
    masks: MaskMaker,
    eos_token_ids: list[int],
    max_model_len: int,
    adapters: Mapping[str, LoraAdapter],
) -> ComputePath:
    """The path of `decoder`."""
    if not isinstance(decoder, TritonDecoder):
        sampler = Sampler(eos_token_ids, masks)
        if isinstance(decoder, NativeDecoder):
            runner = ModelRunner(decoder, kv, config.block_size, decoder.slots())
            native_heads = NativeHeadRunner(decoder.team)
            return ComputePath(runner, sampler, native_heads, native_heads, one_torch_thread, False)
        slots = decoder.slots()
        runner = ModelRunner(decoder, kv, config.block_size, slots)
        heads = HeadRunner()
        return ComputePath(runner, sampler, heads, heads, nullcontext, decoder.device.type == "cuda")
    device_runner = DeviceRunner(
        decoder,
        kv,
        config.block_size,
        max_rows=max_rows,
        max_seqs=max_seqs,
        max_model_len=max_model_len,
        max_adapters=config.max_adapters,
        max_lora_rank=config.max_lora_rank,
        cuda_graphs=config.cuda_graphs,
    )
    device_sampler = DeviceSampler(eos_token_ids, masks, device_runner)
    drafts = device_sampler.drafts = DeviceDrafts(
        device_runner,
        device_sampler.sampled,
        adapters,
        max_heads=config.max_adapters,
        max_model_len=max_model_len,
        max_draft_len=config.max_draft_tokens,
    )
    device_runner.on_seated = drafts.prepare
    device_runner.capture()
    drafts.capture()
    return ComputePath(device_runner, device_sampler, drafts, None, nullcontext, decoder.device.type == "cuda")
