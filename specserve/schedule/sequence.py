"""One sequence that is generated, or pooled: its tokens, its place in the KV cache, its drafts and its counts.

Invariant: KV holds the first `num_computed` tokens of `tokens`. A sequence decodes when exactly one token is left to
compute; otherwise it prefills. Pure Python: the scheduler and its tests need no torch.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

from ..adapter_kinds import PoolingType
from ..messages import BACKGROUND_PRIORITY, GenerateRequest, SamplingParams, Usage
from ..pooling_messages import AnyRequest
from .block_manager import root_key

if TYPE_CHECKING:
    from ..grammar.grammar import Grammar

_MOST_UNCOUNTED = 4096


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """State of one request; `seq_id` orders arrivals.

    One that is pooled ends with its prompt: `pooling` says of which rows the hidden states count.
    """

    __slots__ = (
        "_accepted", "_accepted_by_source", "_drafted", "_drafted_by_source", "_num_counted", "_output_counts",
        "_queue_s", "adapter_hash", "arrived", "block_keys", "block_table", "caller", "cost", "deadline",
        "due", "gets_any_token", "grammar", "has_edits", "is_greedy", "is_traced", "max_len", "named_tokens",
        "needs_every_row", "num_cached", "num_computed", "num_forwards", "owner", "pooled_sum", "pooling", "priority",
        "prompt_keys", "prompt_len", "rank", "request", "request_id", "root_key", "sample_idx", "sampling", "seat",
        "seq_id", "status", "table_id", "takes_best", "tokens", "turn", "wants_prompt_logprobs",
    )  # fmt: skip

    def __init__(
        self, seq_id: int, request: AnyRequest, grammar: Grammar | None = None, pooling: PoolingType | None = None
    ):
        self.seq_id = seq_id
        self.request = request
        self.request_id = request.request_id
        self.sampling: SamplingParams = request.sampling
        self.sample_idx = request.sample_idx if isinstance(request, GenerateRequest) else 0
        self.adapter_hash = request.adapter_hash
        self.caller = request.caller
        self.status = Status.WAITING
        self.priority = request.priority
        self.rank = (request.priority, seq_id)  # whoever has a larger one makes room first
        self.deadline = request.deadline
        self.arrived = self.due = (
            0.0  # by the scheduler's clock; these and `cost` are set by the queue that it waits in
        )
        self.cost = 0.0  # what its caller and adapter were, or are to be, charged for it
        self._queue_s: float | None = None
        self.tokens: list[int] = list(request.prompt_token_ids)
        self.prompt_len = len(self.tokens)
        self.max_len = self.prompt_len + self.sampling.max_tokens
        self._output_counts: Counter[int] = Counter()  # of its first so many tokens
        self._num_counted = self.prompt_len
        self.num_computed = 0
        self.turn = 0  # of its latest step among those that are of half of the sequences
        self.num_cached = 0  # prompt tokens taken from the prefix cache at first admission
        self.block_table: list[int] = []
        self.table_id = object()  # another one whenever the table was emptied: under one it only grows
        self.block_keys: list[bytes] = []
        self.root_key = root_key(request.adapter_hash, request.cache_salt)
        self.prompt_keys: list[bytes] = []  # of the prompt's full blocks, from there on
        self.grammar = grammar  # its place in what it must keep to
        self.owner: Any = None  # what whoever runs it has of it
        self.named_tokens: Any = None  # by its penalties and bias, for a device that edits its logits
        self.seat: Any = None  # its place in a device's tables, for whom they are
        self.pooling: PoolingType | None = pooling
        self.pooled_sum: Any = None  # of the rows that are computed, where a host adds them up
        self.wants_prompt_logprobs = self.sampling.prompt_logprobs is not None
        # Of its prompt, so that the prefix cache, which has none of what a row gives, cannot help.
        self.needs_every_row = self.wants_prompt_logprobs or pooling in ("mean", "weighted_mean")
        self.is_greedy = self.sampling.temperature == 0.0
        self.is_traced = request.speculation.trace
        self.has_edits = bool(  # of its logits, before temperature, at every token
            self.sampling.presence_penalty
            or self.sampling.frequency_penalty
            or self.sampling.repetition_penalty != 1.0
            or self.sampling.logit_bias
        )
        is_edited = self.has_edits or self.sampling.min_tokens > 0  # at some token
        # Whether nothing but its end depends on which token a step gives: no later row, and nothing that it is told.
        self.gets_any_token = not (
            is_edited
            or grammar is not None
            or self.sampling.stop
            or self.sampling.max_tokens == 0
            or self.sampling.logprobs is not None
            or self.wants_prompt_logprobs
        )
        self.takes_best = self.is_greedy and not is_edited and grammar is None  # the most likely token, always
        self.num_forwards = 0
        self._drafted_by_source: Counter[str] = Counter()
        self._accepted_by_source: Counter[str] = Counter()
        self._drafted: list[str] = []  # sources of drafts that are not counted yet
        self._accepted: list[str] = []

    @property
    def is_background(self) -> bool:
        """Nobody waits for it: it gives way to all that are not."""
        return self.priority >= BACKGROUND_PRIORITY

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    def forget_blocks(self) -> None:
        """Begin anew after the block table was released."""
        self.block_keys = []
        self.num_computed = 0
        self.table_id = object()

    def admit(self, now: float) -> None:
        """It runs now, for the first time or after a preemption."""
        self.status = Status.RUNNING
        if self._queue_s is None:
            self._queue_s = now - self.arrived

    @property
    def output_counts(self) -> Counter[int]:
        """How often each token stands in the output."""
        if self._num_counted < len(self.tokens):
            self._output_counts.update(self.tokens[self._num_counted :])
            self._num_counted = len(self.tokens)
        return self._output_counts

    def count_drafts(self, drafted: Seq[str], accepted: Seq[str]) -> None:
        """A draft was verified; by source, its tokens and those that were right."""
        self._drafted += drafted
        self._accepted += accepted
        if len(self._drafted) > _MOST_UNCOUNTED:
            self._count()

    def _count(self) -> None:
        self._drafted_by_source.update(self._drafted)
        self._accepted_by_source.update(self._accepted)
        self._drafted, self._accepted = [], []

    def usage(self) -> Usage:
        self._count()
        drafted, accepted = self._drafted_by_source, self._accepted_by_source
        return Usage(
            prompt_tokens=self.prompt_len,
            completion_tokens=self.output_len,
            cached_tokens=self.num_cached,
            num_forwards=self.num_forwards,
            draft_tokens=drafted.total(),
            accepted_draft_tokens=accepted.total(),
            accepted_prediction_tokens=accepted["prediction"],
            rejected_prediction_tokens=drafted["prediction"] - accepted["prediction"],
            accepted_by_source=dict(accepted),
            queue_s=self.queue_s,
        )

    @property
    def queue_s(self) -> float:
        """From its arrival to its first admission, if that was yet."""
        return self._queue_s or 0.0
