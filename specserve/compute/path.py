"""What runs an engine's steps, whichever path it is: what a path is given, and what it gives.

The engine knows a runner, a sampler and heads; which ones they are follows from the decoder that was loaded
(`loader.py`). Each path builds its own in its folder's build.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from ..adapters.lora import LoraAdapter
from ..drafters.head_files import LookaheadHeadFile
from ..drafters.protocol import Heads, SteppedHeads
from ..messages import GenerateRequest, SamplingParams
from ..schedule.block_manager import BlockManager
from ..schedule.scheduler import ScheduledSequence
from ..schedule.sequence import Sequence
from .grammar_masks import MaskMaker
from .interrupt import StepInterrupt
from .kv_cache import KVCache
from .sampler import Sampler
from .slots import Slots
from .step_output import StepOutput

if TYPE_CHECKING:
    from .cuda.graph_cache import GraphCache


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How large a step may get, and the adapters and drafts in it."""

    max_rows: int
    max_seqs: int
    max_model_len: int
    max_adapters: int
    max_lora_rank: int
    max_draft_tokens: int


@dataclass(frozen=True, slots=True)
class PathInputs:
    """What an engine gives to the path that computes its steps."""

    kv: KVCache
    limits: StepLimits
    masks: MaskMaker
    eos_token_ids: list[int]
    adapters: Mapping[str, LoraAdapter]  # those that are loaded, by content hash; they come and go
    cuda_graphs: bool
    base_head: LookaheadHeadFile | None = None  # drafts for sequences without an adapter, or whose adapter has no head


class StepRunner(Protocol):
    """Runs one forward over whatever was scheduled."""

    @property
    def slots(self) -> Slots: ...

    def forward(self, items: Seq[ScheduledSequence], adapters: Mapping[str, LoraAdapter]) -> StepOutput:
        """One forward over `items`; `adapters` holds every adapter that they name, by content hash.

        Raises `StepInterruptedError` where that was asked for, and it heeds it.
        """
        ...


def _nothing() -> None:
    pass


def _no_clocks() -> Mapping[str, float]:
    return {}


@dataclass(frozen=True, slots=True)
class Phase:
    """A method of one of a path's parts, for profiles of a step."""

    owner: object
    method: str
    name: str
    is_model: bool = False  # arithmetic of the model
    clocks: Callable[[], Mapping[str, float]] = _no_clocks  # seconds so far of what is within it, by name


@dataclass(frozen=True, slots=True)
class ComputePath:
    """The parts of a step that compute."""

    runner: StepRunner
    sampler: Sampler
    heads: Heads
    stepped_heads: SteppedHeads | None  # the same, where the host asks them for each position
    torch_threads: Callable[[], AbstractContextManager[None]]  # around whatever computes
    is_asynchronous: bool  # the device runs by itself while the host goes on
    max_rows_ahead: int = 0  # with logits, whose tokens the next step's rows can name before the host knows them
    beside_step: Callable[[], None] = _nothing  # what a path does for itself once a step is queued
    clock: Callable[[], float] | None = None  # seconds, by which steps are timed; None: the machine's
    phases: tuple[Phase, ...] = ()
    unseen: str = ""  # what the host's clocks cannot see of these phases, and why
    graphs: GraphCache | None = None
    # What its steps' times follow from, beside the model and the machine; None: to be measured at each start, which
    # also warms up.
    costs_key: str | None = None
    interrupt: StepInterrupt = field(default_factory=StepInterrupt)  # heeded on the native path alone

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
            items.append(ScheduledSequence(seq, 1, [0] * (rows_each - 1)))
        try:
            for item in items:
                blocks.reserve(item.seq.block_table, context_len + rows_each)
            start = time.perf_counter()
            with self.torch_threads():
                self.runner.forward(items, {})
            if self.is_asynchronous and torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter() - start
        finally:
            for item in items:
                blocks.release(item.seq.block_table)
