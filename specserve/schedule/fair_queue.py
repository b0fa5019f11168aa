"""Waiting sequences of one priority and one caller, shared out fairly between adapters, in tokens served.

By virtual token counters (`counters`), with differences to their paper: a sequence is charged when it is admitted, for
an output as long as its adapter's were in the mean, and set right when it ends, so that nothing is done per step; and
cached prompt tokens cost nothing.

Two adapters that both have sequences waiting are never further apart than a quantum, a sequence's cost, and what was
guessed wrong of those that run, but for turns that `waiting` gives to who was served longest ago.
"""

from __future__ import annotations

from .counters import QUANTUM, Counters, Member
from .heap import Heap
from .sequence import Sequence

PROMPT_COST = 0.25  # of a prompt token that is computed; an output token costs 1
FIRST_OUTPUT_LEN = 256.0  # expected of an output before any has ended
_MEAN_RATE = 0.1


class OutputLen:
    """The running mean of outputs' lengths."""

    __slots__ = ("mean",)

    def __init__(self, mean: float | None = None):
        self.mean = mean

    def observe(self, output_len: int) -> None:
        mean = output_len if self.mean is None else self.mean
        self.mean = mean + _MEAN_RATE * (output_len - mean)

    def expected(self, max_tokens: int) -> float:
        return min(FIRST_OUTPUT_LEN if self.mean is None else self.mean, max_tokens)


class _Flow(Member):
    """One adapter's sequences of this caller and priority."""

    __slots__ = ("adapter_hash", "cost_waiting", "output_len", "since", "waiting")

    def __init__(self, adapter_hash: str | None, number: int, output_len: float):
        super().__init__(number)
        self.adapter_hash = adapter_hash
        self.since = 0.0  # when one of it was admitted last, or it began to wait
        self.output_len = OutputLen(output_len)
        self.waiting: Heap[Sequence] = Heap()
        self.cost_waiting = 0.0


class FairQueue:
    """The order of waiting sequences of one caller and priority. `output_len` is of all outputs, whoever's."""

    def __init__(self, output_len: OutputLen | None = None) -> None:
        self._flows: dict[str | None, _Flow] = {}
        self._counters: Counters[_Flow] = Counters()
        self._by_since: Heap[_Flow] = Heap()  # those of which some wait
        self._output_len = output_len or OutputLen()
        self.cost_waiting = 0.0
        self.num_waiting = 0

    def add(self, seq: Sequence, now: float) -> None:
        """One that begins to wait; `due` says when it should be served by."""
        flow = self._flows.get(seq.adapter_hash)
        if flow is None:
            mean = FIRST_OUTPUT_LEN if self._output_len.mean is None else self._output_len.mean
            flow = self._flows[seq.adapter_hash] = _Flow(seq.adapter_hash, self._counters.new_number(), mean)
        if not flow.waiting:
            self._counters.begin(flow)
            flow.since = now
        seq.cost = PROMPT_COST * seq.prompt_len + flow.output_len.expected(seq.sampling.max_tokens)
        flow.waiting.put(seq, (seq.due, seq.seq_id))
        self._count(flow, 1, seq.cost)
        self._place(flow)

    def first(self) -> Sequence:
        """Who goes next; stays."""
        return self._counters.first().waiting.first()

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
        """One that waits begins to run: its adapter is charged, and its cost says for what."""
        flow = self._flows[seq.adapter_hash]
        self._counters.advance()
        flow.num_running += 1
        flow.since = now
        self.remove(seq)
        seq.cost -= PROMPT_COST * seq.num_cached
        flow.served += seq.cost
        self._place(flow)
        for caught_up in self._counters.caught_up():
            del self._flows[caught_up.adapter_hash]

    def end(self, seq: Sequence) -> None:
        """One that was admitted has ended: its adapter is charged for what it was served, no more."""
        flow = self._flows[seq.adapter_hash]
        flow.num_running -= 1
        flow.served += unforeseen_cost(seq)
        if seq.pooling is None:
            flow.output_len.observe(seq.output_len)
            self._output_len.observe(seq.output_len)
        self._place(flow)

    def expected_output(self, adapter_hash: str | None, max_tokens: int) -> float:
        """Tokens that an output is expected to have."""
        flow = self._flows.get(adapter_hash)
        return (self._output_len if flow is None else flow.output_len).expected(max_tokens)

    def num_of(self, adapter_hash: str | None) -> int:
        """How many of that adapter's wait."""
        flow = self._flows.get(adapter_hash)
        return 0 if flow is None else len(flow.waiting)

    def cost_ahead(self, adapter_hash: str | None) -> float:
        """What is served, at most, before a new sequence of that adapter: all, or each flow as far as its own is."""
        flow = self._flows.get(adapter_hash)
        own = 0.0 if flow is None else flow.cost_waiting + self._counters.lead(flow)
        return min(self.cost_waiting, (own + QUANTUM / 2) * self._counters.num_backlogged)

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
            self._counters.place(flow, (seq.due, seq.seq_id))
            self._by_since.put(flow, (flow.since, flow.number))
            return
        self._by_since.remove(flow)
        flow.cost_waiting = 0.0
        if self._counters.place(flow, None):
            del self._flows[flow.adapter_hash]


def unforeseen_cost(seq: Sequence) -> float:
    """What a sequence that has ended cost beyond what was charged for it."""
    return PROMPT_COST * (seq.prompt_len - seq.num_cached) + seq.output_len - seq.cost
