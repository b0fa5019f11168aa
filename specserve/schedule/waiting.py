"""Which waiting sequence is admitted next.

By priority first, lower is sooner; within one callers share (`caller_queue`), and of each its adapters (`fair_queue`),
and of one adapter, or where they are about level, the sequence that is due first: its deadline, or `PATIENCE_S` after
its arrival, whichever is sooner. A sequence that was preempted goes before all that have not run, of its priority and
worse ones.

Nobody waits for ever: the caller's adapter, of whatever priority, of which none was admitted for the longest gets every
eighth admission if that is more than `PATIENCE_S` ago, and nobody takes the blocks of that sequence again. So a low
priority keeps an eighth of the admissions, and many adapters starve no other. Background sequences are left out of
that: they wait for as long as others do.

Every operation is O(log n); nothing is done per step for those that wait. Owns the order, not the blocks.
"""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping

from ..messages import BACKGROUND_PRIORITY
from .caller_queue import CallerQueue
from .fair_queue import PROMPT_COST
from .heap import Heap
from .sequence import Sequence

PATIENCE_S = 30.0
UNSERVED_EVERY = 8  # admissions
_FIRST = -sys.maxsize  # better than any priority


class WaitingQueue:
    """All sequences that wait, those that were preempted among them. Times are of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._by_priority: dict[int, CallerQueue] = {}
        self._waiting_priorities: Heap[int] = Heap()  # of sequences that have not run
        self._returning: Heap[Sequence] = Heap()  # were preempted
        self._returning_since: OrderedDict[Sequence, float] = OrderedDict()
        self._by_arrival: OrderedDict[Sequence, None] = OrderedDict()
        self._num_by_adapter: Counter[str | None] = Counter()
        self._by_deadline: Heap[Sequence] = Heap()
        self._num_admitted = 0
        self._prompt_tokens: Counter[int] = Counter()  # by priority, of sequences that have not run

    def __len__(self) -> int:
        return len(self._by_arrival)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_arrival)

    @property
    def num_tokens(self) -> int:
        """Tokens that wait: prompts, and outputs as long as they are expected to be."""
        return self.minded_by(BACKGROUND_PRIORITY)[1]

    def minded_by(self, priority: int) -> tuple[int, int]:
        """Sequences, and `num_tokens`, that count for a new one of that priority: background ones do for such alone."""
        queues = self._counting_for(priority)
        num_returning = len(self._returning if priority >= BACKGROUND_PRIORITY else self._returning_since)
        num = num_returning + sum([queue.num_waiting for _, queue in queues])
        cost = sum([queue.cost_waiting for _, queue in queues])
        return num, round(cost + (1.0 - PROMPT_COST) * sum([self._prompt_tokens[own] for own, _ in queues]))

    def add(self, seq: Sequence, now: float) -> None:
        """A new sequence."""
        seq.arrived = now
        seq.due = now + PATIENCE_S if seq.deadline is None else min(now + PATIENCE_S, seq.deadline)
        queue = self._by_priority.setdefault(seq.priority, CallerQueue())
        queue.add(seq, now)
        self._waiting_priorities.put(seq.priority, seq.priority)
        self._prompt_tokens[seq.priority] += seq.prompt_len
        self._by_arrival[seq] = None
        self._num_by_adapter[seq.adapter_hash] += 1
        if seq.deadline is not None and seq.request.is_first:
            self._by_deadline.put(seq, (seq.deadline, seq.seq_id))

    def put_back(self, seq: Sequence, now: float) -> None:
        """A sequence that was preempted."""
        self._returning.put(seq, seq.rank)
        if not seq.is_background:
            self._returning_since[seq] = now
        self._by_arrival[seq] = None
        self._num_by_adapter[seq.adapter_hash] += 1

    @property
    def num_by_adapter(self) -> Mapping[str | None, int]:
        """Sequences by content hash, None for the base; of those adapters alone of which some wait."""
        return self._num_by_adapter

    def _forget(self, seq: Sequence) -> None:
        del self._by_arrival[seq]
        self._num_by_adapter[seq.adapter_hash] -= 1
        if not self._num_by_adapter[seq.adapter_hash]:
            del self._num_by_adapter[seq.adapter_hash]

    def first(self, now: float) -> Sequence:
        """Who is admitted next; it stays until `admit`."""
        if self._num_admitted % UNSERVED_EVERY == UNSERVED_EVERY - 1:
            longest = self._longest_unserved()
            if longest is not None and now - longest[0] > PATIENCE_S:
                longest[1].rank = (_FIRST, longest[1].seq_id)
                return longest[1]
        if not self._returning:
            return self._by_priority[self._waiting_priorities.first()].first()
        returning = self._returning.first()
        if self._waiting_priorities and (priority := self._waiting_priorities.first()) < returning.priority:
            return self._by_priority[priority].first()
        return returning

    def admit(self, seq: Sequence, now: float) -> None:
        """It runs now; `num_cached` of a new one says what it need not compute."""
        self._num_admitted += 1
        self._forget(seq)
        if seq in self._returning:
            self._leave_returning(seq)
            return
        self._by_priority[seq.priority].admit(seq, now)
        self._left(seq)

    def remove(self, seq: Sequence) -> None:
        """One that waits will not run, or not any more."""
        self._forget(seq)
        if seq in self._returning:
            self._leave_returning(seq)
            self.end(seq)
            return
        self._by_priority[seq.priority].remove(seq)
        self._left(seq)

    def end(self, seq: Sequence) -> None:
        """One that was admitted has ended, whichever way."""
        self._by_priority[seq.priority].end(seq)

    def late(self, now: float) -> list[Sequence]:
        """Those that have not run and whose deadline has passed; they stay until `remove`.

        Of an answer the first sequence alone: once that runs the answer has begun.
        """
        late: list[Sequence] = []
        while self._by_deadline and (seq := self._by_deadline.first()).deadline is not None and seq.deadline <= now:
            self._by_deadline.remove(seq)
            late.append(seq)
        return late

    def num_of(self, caller: str, adapter_hash: str | None, priority: int) -> int:
        """How many of that caller and adapter have not run, of those that count for one of that priority."""
        return sum([queue.num_of(caller, adapter_hash) for _, queue in self._counting_for(priority)])

    def _counting_for(self, priority: int) -> list[tuple[int, CallerQueue]]:
        return [
            (own, queue)
            for own, queue in self._by_priority.items()
            if own < BACKGROUND_PRIORITY or priority >= BACKGROUND_PRIORITY
        ]

    def cost_ahead(self, caller: str, adapter_hash: str | None, priority: int) -> float:
        """What is served, at most, before a new sequence of that caller, adapter and priority is admitted."""
        better = sum([queue.cost_waiting for own, queue in self._by_priority.items() if own < priority])
        queue = self._by_priority.get(priority)
        return better + (0.0 if queue is None else queue.cost_ahead(caller, adapter_hash))

    def expected_output(self, caller: str, adapter_hash: str | None, priority: int, max_tokens: int) -> float:
        """Tokens that an output of that caller and adapter is expected to have."""
        queue = self._by_priority.get(priority) or CallerQueue()
        return queue.expected_output(caller, adapter_hash, max_tokens)

    def _longest_unserved(self) -> tuple[float, Sequence] | None:
        """Since when, and who; None where only background sequences wait."""
        found = [
            self._by_priority[priority].longest_unserved()
            for priority in self._waiting_priorities
            if priority < BACKGROUND_PRIORITY
        ]
        if self._returning_since:
            seq, since = next(iter(self._returning_since.items()))
            found.append((since, seq))
        return min(found, key=lambda each: each[0], default=None)

    def _leave_returning(self, seq: Sequence) -> None:
        self._returning.remove(seq)
        self._returning_since.pop(seq, None)

    def _left(self, seq: Sequence) -> None:
        self._prompt_tokens[seq.priority] -= seq.prompt_len
        self._by_deadline.remove(seq)
        if not self._by_priority[seq.priority].num_waiting:
            self._waiting_priorities.remove(seq.priority)
