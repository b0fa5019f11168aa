"""Decides which rows of which sequences the next forward computes. Pure Python, no torch.

Continuous batching over one ragged batch. Each step, in this order: waiting sequences are admitted in the order of
`waiting` while there is room; every decoding sequence gets its row; prefills share what is left of the row budget, a
quarter for the oldest and the rest by priority and shortest remaining work, so that no prompt starves another and,
beside decodes, a prefill stays short. When KV blocks run out the latest arrival of the worst priority is preempted: its
blocks are freed and its tokens, output included, are computed again later. A sequence of the best priority that fits
the cache alone (checked at admission by the engine) therefore always finishes. Background sequences are in a step as
far as `background` lets them, and give up seat and blocks for any other that is waiting.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq

import msgspec

from .background import Background
from .block_manager import BlockManager
from .sequence import Sequence, Status
from .waiting import WaitingQueue


class ScheduledSequence(msgspec.Struct, gc=False, eq=False):
    """`num_rows` tokens of `seq` from `num_computed` on, then the drafts, are computed in this step."""

    seq: Sequence
    num_rows: int
    drafts: Seq[int] = ()
    draft_sources: Seq[str] = ()  # one per draft
    reaches_end: bool = True  # the last non-draft row is the newest token, so that one can be sampled: never if pooled
    draft_chances: Seq[float] = ()  # one per draft, of sequences that are traced


class Scheduler:
    """Owns the waiting and running queues and, through `BlockManager`, every sequence's blocks."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_num_seqs: int,
        max_batched_tokens: int,
        max_prefill_rows: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.blocks = blocks
        self.clock = clock
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max(max_batched_tokens, max_num_seqs)
        self.max_prefill_rows = max_prefill_rows  # rows of prefill beside running decodes
        self.background = Background(max_num_seqs, max_prefill_rows)
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # by priority, then in order of arrival
        self.num_preemptions = 0
        self._turn = 0

    def add(self, seq: Sequence) -> None:
        seq.prompt_keys = self.blocks.prompt_keys(seq.root_key, seq.tokens)
        self.waiting.add(seq, self.clock())

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def sequences(self) -> list[Sequence]:
        return [*self.running, *self.waiting]

    def remove(self, seq: Sequence) -> None:
        """Take a finished or aborted sequence out and free its blocks."""
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            self.waiting.end(seq)
        elif seq.status is Status.WAITING:
            self.waiting.remove(seq)
        seq.status = Status.FINISHED
        self.blocks.release(seq.block_table, owner=seq.seq_id)

    def schedule(self, in_flight: Collection[Sequence] = (), half: bool = False) -> list[ScheduledSequence]:
        """The rows of the next step, KV for them is reserved; empty when nothing runs.

        `half` of the sequences at most, those whose turn is longest ago.

        Sequences that are `in_flight` stay as they are: a step of theirs runs, and what it gives is not known. Where KV
        for the others would have to be taken from somebody, there is no step until it is.
        """
        self._admit(in_flight)
        size, num_preemptions, running = self.blocks.block_size, self.num_preemptions, Status.RUNNING
        chosen = [seq for seq in self.running if seq not in in_flight] if in_flight else self.running[:]
        num_in_flight = len(self.running) - len(chosen)
        chosen, background_rows = self.background.choose(chosen, self.running, self.clock())
        if half:
            self._turn += 1
            chosen = sorted(chosen, key=lambda seq: seq.turn)[: -(-(num_in_flight + len(chosen)) // 2)]
            chosen.sort(key=_rank)
            for seq in chosen:
                seq.turn = self._turn
        prefilling = [seq for seq in chosen if len(seq.tokens) - seq.num_computed > 1]
        shares: dict[int, int] = {}
        if prefilling:
            budget = self.max_batched_tokens - (len(chosen) - len(prefilling))
            if any(seq.pooling is None and len(seq.tokens) - seq.num_computed == 1 for seq in chosen):  # some decode
                budget = min(budget, self.max_prefill_rows)
            shares = _share(budget, prefilling, background_rows)
        scheduled = []
        for seq in chosen:
            if seq.status is not running:
                continue
            tokens, start = seq.tokens, seq.num_computed
            num_tokens = len(tokens)
            num_rows = 1 if num_tokens - start == 1 else shares.get(seq.seq_id, 0)
            if not num_rows:
                continue
            if num_tokens >= seq.max_len and tokens[-1] < 0:  # ends with that token, whichever it is
                continue
            has_room = start + num_rows <= len(seq.block_table) * size
            if not has_room and in_flight and not self._reserve(seq, start + num_rows):
                return []
            if has_room or in_flight or self._reserve_or_preempt(seq, num_rows):
                reaches_end = start + num_rows == num_tokens and seq.pooling is None
                scheduled.append(ScheduledSequence(seq, num_rows, (), (), reaches_end))
        if self.num_preemptions > num_preemptions:
            # A later sequence may have been preempted after an earlier one was scheduled, never the other way round.
            scheduled = [item for item in scheduled if item.seq.status is Status.RUNNING]
        return scheduled

    def reserve_drafts(self, item: ScheduledSequence, num_drafts: int) -> int:
        """Reserve KV for drafts after the scheduled rows; returns how many fit. Never preempts for a draft."""
        seq = item.seq
        if seq.num_computed + item.num_rows + num_drafts <= len(seq.block_table) * self.blocks.block_size:
            return num_drafts
        while num_drafts > 0:
            if self._reserve(seq, seq.num_computed + item.num_rows + num_drafts):
                break
            num_drafts -= 1
        return num_drafts

    def _admit(self, in_flight: Collection[Sequence]) -> None:
        if not self.waiting or (len(self.running) >= self.max_num_seqs and not self.running[-1].is_background):
            return
        now = self.clock()
        pending = self._num_pending()
        while self.waiting:
            seq = self.waiting.first(now)
            if seq.is_background and not self.background.admits(self.running, now):
                return
            if len(self.running) >= self.max_num_seqs:
                if not self._makes_way(seq, in_flight):
                    return
                pending = self._num_pending()
            if seq.num_computed == 0 and not seq.block_table and not seq.needs_every_row:
                seq.block_table, seq.block_keys = self.blocks.match_prefix(seq.root_key, seq.tokens, seq.prompt_keys)
                seq.num_computed = len(seq.block_table) * self.blocks.block_size
            need = self._num_missing(seq)
            while need + pending > self.blocks.num_free and self.running:
                if not self._makes_way(seq, in_flight):
                    self._release(seq)
                    return
                pending = self._num_pending()
            if seq.output_len == 0:
                seq.num_cached = seq.num_computed
            self.waiting.admit(seq, now)
            seq.admit(now)
            pending += need
            bisect.insort(self.running, seq, key=_rank)

    def _num_pending(self) -> int:
        """Blocks that those who run will ask for. Most have them: of these there is nothing to add up."""
        size = self.blocks.block_size
        return sum([self._num_missing(s) for s in self.running if len(s.block_table) * size <= len(s.tokens)])

    def _makes_way(self, seq: Sequence, in_flight: Collection[Sequence]) -> bool:
        """Whether a background sequence that runs has left for `seq`, which waits."""
        victim = self.running[-1]
        if seq.is_background or not victim.is_background or victim in in_flight:
            return False
        self._preempt(victim)
        return True

    def _num_missing(self, seq: Sequence) -> int:
        """Blocks that a sequence needs for its tokens and the next one, if any, beside those that it has."""
        num_tokens = len(seq.tokens) + (seq.pooling is None)
        return max(0, -(-num_tokens // self.blocks.block_size) - len(seq.block_table))

    def _reserve(self, seq: Sequence, num_tokens: int) -> bool:
        return self.blocks.reserve(seq.block_table, num_tokens, claim_tokens=seq.max_len, owner=seq.seq_id)

    def _reserve_or_preempt(self, seq: Sequence, num_rows: int) -> bool:
        while not self._reserve(seq, seq.num_computed + num_rows):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.num_preemptions += 1
        self.running.remove(seq)
        self._release(seq)
        seq.status = Status.WAITING
        self.waiting.put_back(seq, self.clock())

    def _release(self, seq: Sequence) -> None:
        self.blocks.release(seq.block_table, owner=seq.seq_id)
        seq.forget_blocks()


def _rank(seq: Sequence) -> tuple[int, int]:
    return seq.rank


def _share(budget: int, prefilling: list[Sequence], background_rows: int | None = None) -> dict[int, int]:
    """Split `budget` rows: a quarter for the oldest, so that nothing starves, then by priority and remaining work.

    Background sequences get what others leave, and at most `background_rows`, if that is not None.
    """
    if background_rows is not None:
        rows = _share(budget, [seq for seq in prefilling if not seq.is_background])
        budget = min(budget - sum(rows.values()), background_rows)
        return rows | _share(budget, [seq for seq in prefilling if seq.is_background])
    rows = {}
    if not prefilling or budget <= 0:
        return rows
    oldest = min(prefilling, key=lambda seq: seq.seq_id)
    rows[oldest.seq_id] = min(oldest.num_uncomputed, max(1, budget // 4))
    budget -= rows[oldest.seq_id]
    for seq in sorted(prefilling, key=lambda seq: (seq.priority, seq.num_uncomputed, seq.seq_id)):
        num_rows = min(seq.num_uncomputed - rows.get(seq.seq_id, 0), budget)
        if num_rows:
            rows[seq.seq_id] = rows.get(seq.seq_id, 0) + num_rows
            budget -= num_rows
    return rows
