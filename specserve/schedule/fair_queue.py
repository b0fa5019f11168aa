"""Waiting sequences of one priority, shared out fairly between adapters, in tokens served.

Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): an adapter's counter
grows by what its sequences cost, and the adapter with the least goes next; one that comes back with nothing waiting
begins where the others are, so that nobody saves service up. We differ in three ways. A sequence is charged when it is
admitted, for an output as long as its adapter's were in the mean, and set right when it ends: nothing is done per step.
Counters are compared by quanta: within one, the sequence that is due first goes first, whoever's it is. And cached
prompt tokens cost nothing.

Two adapters that both have sequences waiting are never further apart than a quantum, a sequence's cost, and what was
guessed wrong of those that run, but for turns that `waiting` gives to who was served longest ago. Invariant: a flow is
known while a sequence of it waits or runs, or while it is ahead of the present quantum.
"""

from __future__ import annotations

from .heap import Heap
from .sequence import Sequence

QUANTUM = 256.0  # of cost
PROMPT_COST = 0.25  # of a prompt token that is computed; an output token costs 1
FIRST_OUTPUT_LEN = 256.0  # expected of an output before any has ended
_MEAN_RATE = 0.1


class _Flow:
    """One adapter's sequences of this priority."""

    __slots__ = ("adapter_hash", "cost_waiting", "num_running", "number", "output_len", "served", "since", "waiting")

    def __init__(self, adapter_hash: str | None, number: int, output_len: float):
        self.adapter_hash = adapter_hash
        self.number = number  # of the flow, which makes keys differ
        self.served = 0.0  # cost, since the queue began
        self.since = 0.0  # when one of it was admitted last, or it began to wait
        self.output_len = output_len  # running mean
        self.waiting: Heap[Sequence] = Heap()
        self.cost_waiting = 0.0
        self.num_running = 0  # admitted and not ended


class FairQueue:
    """The order of waiting sequences of one priority."""

    def __init__(self) -> None:
        self._flows: dict[str | None, _Flow] = {}
        self._num_flows = 0  # ever
        self._backlogged: Heap[_Flow] = Heap()
        self._by_since: Heap[_Flow] = Heap()  # the same ones
        self._idle: Heap[_Flow] = Heap()  # nothing waits or runs, and yet ahead of the present quantum
        self._quantum = 0  # the present one: the least of those that wait, or was
        self._output_len: float | None = None  # running mean over all flows
        self.cost_waiting = 0.0
        self.num_waiting = 0

    def add(self, seq: Sequence, now: float) -> None:
        """One that begins to wait; `due` says when it should be served by."""
        flow = self._flows.get(seq.adapter_hash)
        if flow is None:
            output_len = FIRST_OUTPUT_LEN if self._output_len is None else self._output_len
            self._num_flows += 1
            flow = self._flows[seq.adapter_hash] = _Flow(seq.adapter_hash, self._num_flows, output_len)
        if not flow.waiting:
            flow.served, flow.since = max(flow.served, self._quantum * QUANTUM), now
            self._idle.remove(flow)
        seq.cost = PROMPT_COST * seq.prompt_len + self.expected_output(seq.adapter_hash, seq.sampling.max_tokens)
        flow.waiting.put(seq, (seq.due, seq.seq_id))
        self._count(flow, 1, seq.cost)
        self._place(flow)

    def first(self) -> Sequence:
        """Who goes next; stays."""
        return self._backlogged.first().waiting.first()

    def longest_unserved(self) -> tuple[float, Sequence]:
        """Since when none of the flow was admitted of which none was for the longest, and who of it goes next."""
        flow = self._by_since.first()
        return flow.since, flow.waiting.first()

    def remove(self, seq: Sequence) -> None:
        """One that waits leaves and is charged for nothing."""
        flow = self._flows[seq.adapter_hash]
        flow.waiting.remove(seq)
        self._count(flow, -1, -seq.cost)
        self._place(flow)

    def admit(self, seq: Sequence, now: float) -> None:
        """One that waits begins to run: its adapter is charged."""
        flow = self._flows[seq.adapter_hash]
        quantum, *_ = self._backlogged.key(self._backlogged.first())  # not of one that is admitted out of its turn
        self._quantum = max(self._quantum, quantum)
        flow.num_running += 1
        flow.since = now
        self.remove(seq)
        seq.cost -= PROMPT_COST * seq.num_cached
        flow.served += seq.cost
        self._place(flow)
        while self._idle and (first := self._idle.first()).served <= self._quantum * QUANTUM:
            self._idle.remove(first)
            del self._flows[first.adapter_hash]

    def end(self, seq: Sequence) -> None:
        """One that was admitted has ended: its adapter is charged for what it was served, no more."""
        flow, output_len = self._flows[seq.adapter_hash], seq.output_len
        flow.num_running -= 1
        flow.served += PROMPT_COST * (seq.prompt_len - seq.num_cached) + output_len - seq.cost
        flow.output_len += _MEAN_RATE * (output_len - flow.output_len)
        mean = output_len if self._output_len is None else self._output_len
        self._output_len = mean + _MEAN_RATE * (output_len - mean)
        self._place(flow)

    def expected_output(self, adapter_hash: str | None, max_tokens: int) -> float:
        """Tokens that an output is expected to have."""
        flow = self._flows.get(adapter_hash)
        if flow is not None:
            return min(flow.output_len, max_tokens)
        return min(FIRST_OUTPUT_LEN if self._output_len is None else self._output_len, max_tokens)

    def num_of(self, adapter_hash: str | None) -> int:
        """How many of that adapter's wait."""
        flow = self._flows.get(adapter_hash)
        return 0 if flow is None else len(flow.waiting)

    def cost_ahead(self, adapter_hash: str | None) -> float:
        """What is served, at most, before a new sequence of that adapter: all, or each flow as far as its own is."""
        flow = self._flows.get(adapter_hash)
        own = 0.0 if flow is None else flow.cost_waiting + max(0.0, flow.served - self._quantum * QUANTUM)
        return min(self.cost_waiting, (own + QUANTUM / 2) * len(self._backlogged))

    def _count(self, flow: _Flow, num: int, cost: float) -> None:
        self.num_waiting += num
        flow.cost_waiting += cost
        self.cost_waiting += cost
        if not self.num_waiting:
            self.cost_waiting = 0.0  # no rounding stays

    def _place(self, flow: _Flow) -> None:
        """Where a flow belongs after any change of it."""
        if flow.waiting:
            seq = flow.waiting.first()
            self._backlogged.put(flow, (int(flow.served // QUANTUM), seq.due, seq.seq_id))
            self._by_since.put(flow, (flow.since, flow.number))
            return
        self._backlogged.remove(flow)
        self._by_since.remove(flow)
        flow.cost_waiting = 0.0
        if flow.num_running:
            return
        if flow.served > self._quantum * QUANTUM:
            self._idle.put(flow, (flow.served, flow.number))
        else:
            self._idle.remove(flow)
            del self._flows[flow.adapter_hash]
