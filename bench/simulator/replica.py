"""One simulated server: the engine's own scheduler, KV blocks, adapter places and refusals, on a clock of its own.

What is simulated is the model alone: a step takes what the cost table says, and every sequence gets its next token. An
adapter is read in `load_s`, several at a time as by the engine's threads, into room that the real registry gives.
Replicas know nothing of each other.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from specserve.adapters.registry import AdapterRegistry, Reservation
from specserve.config import EngineConfig
from specserve.engine.adapter_loads import NUM_READERS
from specserve.engine.admission import refuse_overload
from specserve.engine.wait_estimate import WaitEstimate
from specserve.errors import UserError
from specserve.messages import BACKGROUND_PRIORITY, GenerateRequest, SamplingParams
from specserve.schedule.block_manager import BlockManager
from specserve.schedule.scheduler import Scheduler
from specserve.schedule.sequence import Sequence
from specserve.schedule.waiting import WaitingQueue

from .costs import FittedCosts, Step
from .trace import SimulatedRequest

MEASURE_S = 1.0  # between looks at the load, as in the engine's process


class FirstComeQueue(WaitingQueue):
    """What the engine did before: whoever came first, whatever the adapter; those that were preempted before them."""

    def first(self, now: float) -> Sequence:
        return self._returning.first() if self._returning else next(iter(self._by_arrival))


@dataclass(slots=True, eq=False)
class Outcome:
    """What became of one request; times are the replica's."""

    request: SimulatedRequest
    admitted_s: float | None = None
    first_token_s: float | None = None
    end_s: float | None = None
    added_s: float | None = None  # its adapter was there
    expected_wait_s: float | None = None  # as estimated then
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Adapter:
    content_hash: str


@dataclass(slots=True)
class _Load:
    room: Reservation
    waiting: list[tuple[Outcome, GenerateRequest]] = field(default_factory=list)
    is_read: bool = False  # or being read


def config_of(max_num_seqs: int, places: int) -> EngineConfig:
    """Of a replica that refuses nobody."""
    return EngineConfig(
        max_num_seqs=max_num_seqs, max_batched_tokens=256, max_prefill_rows=64, max_adapters=places,
        max_waiting=10**6, max_waiting_tokens=10**9,
    )  # fmt: skip


class Replica:
    """`submit` what has arrived by `now`, then `turn`; `next_s` says when there is something to do."""

    def __init__(
        self,
        costs: FittedCosts,
        config: EngineConfig,
        num_blocks: int,
        load_s: float,
        make_queue: Callable[[], WaitingQueue] = WaitingQueue,
    ):
        assert config.max_num_seqs and config.max_batched_tokens and config.max_prefill_rows
        self.now = 0.0
        self._costs, self._config, self._load_s = costs, config, load_s
        self.blocks = BlockManager(num_blocks, config.block_size, config.prefix_caching)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            max_prefill_rows=config.max_prefill_rows,
            clock=self.clock,
        )
        self.scheduler.waiting = make_queue()
        self.on_end: Callable[[Outcome], object] = lambda outcome: None
        self.on_left: Callable[[str], object] = lambda adapter: None  # it made room
        self.registry = AdapterRegistry(config.max_adapters, self.clock)
        self.waits = WaitEstimate(self.scheduler, lambda num: costs.seconds(Step(num, num, num, 0)))
        self._loads: dict[str, _Load] = {}
        self._unread: deque[str] = deque()  # granted room, no reader yet
        self._reading: list[tuple[float, str]] = []  # when each will be there
        self._num_added = 0
        self._next_measure = MEASURE_S
        self.prompt_tokens = self.generated_tokens = self.num_steps = 0
        self.served: Counter[tuple[int, int]] = Counter()  # output tokens by adapter and priority

    def hold(self, adapter: int) -> None:
        """Have an adapter from the start."""
        self.registry.add(_Adapter(_name(adapter)), 1)  # type: ignore[arg-type]

    def has(self, adapter: int) -> bool:
        """Whether a request finds it here, or on its way."""
        return self.registry.is_staying(_name(adapter)) or _name(adapter) in self._loads

    def clock(self) -> float:
        return self.now

    @property
    def next_s(self) -> float:
        """When it can go on; infinite when nothing is there to do."""
        if self.scheduler.has_work() or any(load.room.is_granted and not load.is_read for load in self._loads.values()):
            return self.now
        if any(not load.room.is_granted for load in self._loads.values()):
            return self.now + 0.05  # as often as the engine's process looks for places
        return max(self.now, self._reading[0][0]) if self._reading else math.inf

    def submit(self, request: SimulatedRequest) -> Outcome:
        """A request that arrives; its adapter is loaded first, if it is not there."""
        outcome = Outcome(request)
        self._num_added += 1
        start, unique = (request.adapter + 1) << 32, (self._num_added << 32) | 1 << 60
        prompt = [*range(start, start + request.shared_len)]
        prompt += range(unique, unique + request.prompt_len - len(prompt))
        deadline = None if request.deadline_s is None else request.arrival_s + request.deadline_s
        generate = GenerateRequest(
            str(self._num_added), prompt, SamplingParams(max_tokens=request.max_tokens),
            adapter_hash=_name(request.adapter), caller=request.caller, priority=request.priority, deadline=deadline,
        )  # fmt: skip
        self._bring(outcome, generate)
        return outcome

    def _bring(self, outcome: Outcome, request: GenerateRequest) -> None:
        key = request.adapter_hash
        assert key is not None
        if self.registry.is_staying(key):
            self._add(outcome, request)
            return
        if key not in self._loads:
            self._loads[key] = _Load(self.registry.ask(1, key, priority=request.priority))
        load = self._loads[key]
        self.registry.prioritize(load.room, min(load.room.priority, request.priority))
        load.waiting.append((outcome, request))

    def _add(self, outcome: Outcome, request: GenerateRequest) -> None:
        try:
            outcome.added_s, outcome.expected_wait_s = self.now, self.waits.wait_s(request)
            refuse_overload(request, self._config, self.scheduler, self.waits)
            self.registry.acquire(request.adapter_hash or "", request.priority >= BACKGROUND_PRIORITY)
        except UserError as error:
            if error.code == "adapter_not_resident":  # it was asked to make room
                self._bring(outcome, request)
            else:
                outcome.error = error.code
                self.on_end(outcome)
            return
        seq = Sequence(int(request.request_id), request)
        seq.owner = outcome
        self.scheduler.add(seq)

    def turn(self) -> None:
        """One step, or one look for what can go on."""
        self._go_on_with_loads()
        for seq in self.scheduler.waiting.late(self.now):
            seq.owner.error = "deadline_exceeded"
            self._remove(seq)
        if self.now >= self._next_measure:
            self.waits.observe(self.prompt_tokens, self.generated_tokens)
            self._next_measure = self.now + MEASURE_S
        started = self.now
        items = self.scheduler.schedule()
        if not items:
            return
        adapters = {item.seq.adapter_hash for item in items}
        num_rows, num_keys = sum([i.num_rows for i in items]), sum([i.seq.num_computed for i in items])
        self.now += self._costs.seconds(Step(num_rows, len(items), len(adapters), num_keys))
        self.num_steps += 1
        size = self.blocks.block_size
        for item in items:
            seq, outcome = item.seq, item.seq.owner
            if outcome.admitted_s is None:
                outcome.admitted_s = started
            if seq.output_len == 0:
                self.prompt_tokens += item.num_rows
            seq.num_computed += item.num_rows
            if (len(seq.block_keys) + 1) * size <= seq.num_computed:
                self.blocks.commit(
                    seq.block_table, seq.block_keys, seq.root_key, seq.tokens, seq.num_computed, seq.prompt_keys
                )
            if item.reaches_end:
                self._give_token(seq, outcome)

    def _give_token(self, seq: Sequence, outcome: Outcome) -> None:
        request = outcome.request
        seq.tokens.append(1)
        self.generated_tokens += 1
        self.served[request.adapter, request.priority] += 1
        if outcome.first_token_s is None:
            outcome.first_token_s = self.now
        if seq.output_len == request.output_len:
            outcome.end_s = self.now
            self._remove(seq)
        elif seq.deadline is not None and self.now > seq.deadline:
            outcome.error = "deadline_exceeded"
            self._remove(seq)

    def _remove(self, seq: Sequence) -> None:
        self.scheduler.remove(seq)
        self.registry.release(seq.adapter_hash or "", seq.is_background)
        self.on_end(seq.owner)

    def _go_on_with_loads(self) -> None:
        if not self._loads:
            return
        self.registry.grant()
        for left in self.registry.take_left():
            self.on_left(left)
        for key, load in self._loads.items():
            if load.room.is_granted and not load.is_read:
                load.is_read = True
                if load.room.is_held:
                    heapq.heappush(self._reading, (self.now, key))
                else:
                    self._unread.append(key)
        while self._unread and sum(at_s > self.now for at_s, _ in self._reading) < NUM_READERS:
            heapq.heappush(self._reading, (self.now + self._load_s, self._unread.popleft()))
        while self._reading and self._reading[0][0] <= self.now:
            _, key = heapq.heappop(self._reading)
            load = self._loads.pop(key)
            if not load.room.is_held:
                self.registry.put(_Adapter(key), load.room, self._load_s)  # type: ignore[arg-type]
            for outcome, request in load.waiting:
                self._bring(outcome, request)


def _name(adapter: int) -> str:
    return f"adapter-{adapter}"
