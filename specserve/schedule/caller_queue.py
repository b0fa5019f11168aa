"""Waiting sequences of one priority, shared out fairly between callers, and what is a caller's between its adapters.

A caller is who sends requests: a key's name, or nobody's. Both levels are the same counters: the caller that was served
least goes next, and of it the adapter that was. So a caller that floods an adapter holds up nobody else who asks for
it, and one that asks for many adapters gets no more than one that asks for one. With a single caller the order is that
of its adapters alone. Owns the callers, and nothing of their adapters but the queues that they are in.
"""

from __future__ import annotations

from .counters import QUANTUM, Counters, Member
from .fair_queue import FairQueue, OutputLen, unforeseen_cost
from .heap import Heap
from .sequence import Sequence


class _Share(Member):
    """One caller's sequences of this priority."""

    __slots__ = ("adapters", "caller")

    def __init__(self, caller: str, number: int, output_len: OutputLen):
        super().__init__(number)
        self.caller = caller
        self.adapters = FairQueue(output_len)


class CallerQueue:
    """The order of waiting sequences of one priority."""

    def __init__(self) -> None:
        self._shares: dict[str, _Share] = {}
        self._counters: Counters[_Share] = Counters()
        self._by_since: Heap[_Share] = Heap()  # those of which some wait
        self._output_len = OutputLen()
        self.cost_waiting = 0.0
        self.num_waiting = 0

    def add(self, seq: Sequence, now: float) -> None:
        """One that begins to wait; `due` says when it should be served by."""
        share = self._shares.get(seq.caller)
        if share is None:
            share = self._shares[seq.caller] = _Share(seq.caller, self._counters.new_number(), self._output_len)
        if not share.adapters.num_waiting:
            self._counters.begin(share)
        share.adapters.add(seq, now)
        self._count(1, seq.cost)
        self._place(share)

    def first(self) -> Sequence:
        """Who goes next; stays."""
        return self._counters.first().adapters.first()

    def longest_unserved(self) -> tuple[float, Sequence]:
        """Since when no adapter of a caller was served that was not for the longest, and who of it goes next."""
        return self._by_since.first().adapters.longest_unserved()

    def remove(self, seq: Sequence) -> None:
        """One that waits leaves and is charged for nothing."""
        share = self._shares[seq.caller]
        share.adapters.remove(seq)
        self._count(-1, -seq.cost)
        self._place(share)

    def admit(self, seq: Sequence, now: float) -> None:
        """One that waits begins to run: its caller is charged, and its adapter."""
        share = self._shares[seq.caller]
        self._counters.advance()
        share.num_running += 1
        self._count(-1, -seq.cost)
        share.adapters.admit(seq, now)
        share.served += seq.cost
        self._place(share)
        for caught_up in self._counters.caught_up():
            del self._shares[caught_up.caller]

    def end(self, seq: Sequence) -> None:
        """One that was admitted has ended: its caller is charged for what it was served, no more."""
        share = self._shares[seq.caller]
        share.num_running -= 1
        share.served += unforeseen_cost(seq)
        share.adapters.end(seq)
        self._place(share)

    def expected_output(self, caller: str, adapter_hash: str | None, max_tokens: int) -> float:
        """Tokens that an output is expected to have."""
        share = self._shares.get(caller)
        if share is None:
            return self._output_len.expected(max_tokens)
        return share.adapters.expected_output(adapter_hash, max_tokens)

    def num_of(self, caller: str, adapter_hash: str | None) -> int:
        """How many of that caller's wait for that adapter."""
        share = self._shares.get(caller)
        return 0 if share is None else share.adapters.num_of(adapter_hash)

    def cost_ahead(self, caller: str, adapter_hash: str | None) -> float:
        """What is served, at most, before a new sequence of that caller and adapter.

        What is ahead of it of its own caller's, and of each other caller as much as that and what its own is ahead.
        """
        share, num_others = self._shares.get(caller), self._counters.num_backlogged
        own = lead = 0.0
        if share is not None:
            own, lead = share.adapters.cost_ahead(adapter_hash), self._counters.lead(share)
            num_others -= share.adapters.num_waiting > 0
        return min(self.cost_waiting, own + num_others * (own + lead + QUANTUM / 2))

    def _count(self, num: int, cost: float) -> None:
        self.num_waiting += num
        self.cost_waiting += cost
        if not self.num_waiting:
            self.cost_waiting = 0.0  # no rounding stays

    def _place(self, share: _Share) -> None:
        """Where a caller belongs after any change of what is its."""
        if share.adapters.num_waiting:
            seq = share.adapters.first()
            self._counters.place(share, (seq.due, seq.seq_id))
            self._by_since.put(share, (share.adapters.longest_unserved()[0], share.number))
            return
        self._by_since.remove(share)
        if self._counters.place(share, None):
            del self._shares[share.caller]
