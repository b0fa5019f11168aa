"""A device that takes a given time a step in the background, and returns recorded tokens: no kernel is launched.

Time here is what the thread computed, and what it would have waited for the device; so waits take none, and neither do
other processes.

The engine around it is the real one with the CUDA path's own parts: filling of buffers, seats, slots, sampling
parameters, masks, chains of drafts. Only what would be queued on the device is not: it is put on a clock instead, and
where results come back the host waits for that clock. Tokens are those of a script for each sequence; heads guess the
script's next tokens and go wrong at a given rate.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from specserve.compute.cuda.buckets import Bucket
from specserve.compute.cuda.buffers import HostPage
from specserve.compute.cuda.decoder import TritonDecoder
from specserve.compute.cuda.drafts import DeviceDrafts
from specserve.compute.cuda.graph_cache import GraphCache
from specserve.compute.cuda.parts import DeviceParts
from specserve.compute.cuda.runner import DeviceRunner
from specserve.compute.cuda.sampled_tokens import SampledTokens
from specserve.compute.cuda.sampler import DeviceSampler
from specserve.compute.path import ComputePath, PathInputs, Phase
from specserve.compute.sampler import PendingSample
from specserve.schedule.block_manager import BlockManager
from specserve.schedule.row_group import RowGroup
from specserve.schedule.sequence import Sequence as EngineSequence


@dataclass(frozen=True, slots=True)
class DeviceTimes:
    """Seconds that the device needs, those of the layers grow with the padded rows; and how slow the host is."""

    step_s: float = 1.3e-3
    row_s: float = 2.0e-6
    heads_s: float = 0.3e-3
    host_factor: float = 1.0  # times what its thread takes here

    def layers(self, num_rows: int) -> float:
        return self.step_s + self.row_s * num_rows


@dataclass
class DeviceClock:
    """When the device will be done with what was queued; how long it stood idle before each step."""

    times: DeviceTimes
    busy_until: float = 0.0
    waited_s: float = 0.0  # by the host, for results
    idle_s: list[float] = field(default_factory=list)  # between two steps
    _stood_s: float = 0.0

    @property
    def now(self) -> float:
        return self.times.host_factor * (time.thread_time() - self._stood_s) + self.waited_s

    def queue_step(self, num_rows: int) -> None:
        if self.busy_until:
            self.idle_s.append(max(0.0, self.now - self.busy_until))
        self.queue(self.times.layers(num_rows))

    def queue(self, seconds: float) -> None:
        self.busy_until = max(self.now, self.busy_until) + seconds

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """What is done here takes no time: the device would have done it."""
        start = time.thread_time()
        yield
        self._stood_s += time.thread_time() - start

    def wait(self, until: float) -> None:
        """For what was queued up to then."""
        self.waited_s += max(0.0, until - self.now)


class Script:
    """What each request will say: `tokens` by request id, and how often a head's guess is right."""

    def __init__(self, head_rate: float, vocab_size: int, seed: int = 0):
        self.tokens: dict[str, Sequence[int]] = {}
        self._head_rate, self._vocab_size = head_rate, vocab_size
        self._rng = random.Random(seed)

    def rows(self, group: RowGroup) -> list[int]:
        """The target's token at each of the group's rows, had all drafts before it been right."""
        said, first = self.tokens[group.seq.request_id], group.seq.output_len
        return [self._at(said, first + idx) for idx in range(group.num_rows)]

    def guesses(self, seq: EngineSequence, num_accepted: int, num: int) -> list[int]:
        """A head's guesses behind the accepted tokens and the one that follows them."""
        said, first = self.tokens[seq.request_id], seq.output_len + num_accepted + 1
        made = []
        for idx in range(num):
            token = self._at(said, first + idx)
            made.append(token if self._rng.random() < self._head_rate else (token + 1) % self._vocab_size)
        return made

    @staticmethod
    def _at(said: Sequence[int], idx: int) -> int:
        return said[idx % len(said)]


class StandIn:
    """Makes the path of an engine (`Engine(..., make_path=stand_in.make_path)`); `script` is set behind it."""

    def __init__(self, times: DeviceTimes, script: Script):
        self.clock, self.script = DeviceClock(times), script
        self.groups: Sequence[RowGroup] = ()

    def make_path(self, decoder: TritonDecoder, inputs: PathInputs) -> ComputePath:
        limits = inputs.limits
        parts = DeviceParts.of(decoder, inputs.kv, limits, _Graphs(self))
        self._sampled, self.drafts = parts.sampled, _Drafts(parts, parts.sampled.tokens, inputs.adapters, limits)
        self._put_on_the_clock(parts.sampled)
        runner = DeviceRunner(parts, on_seated=self.drafts.prepare)
        sampler = _Sampler(self, inputs, parts, self.drafts)
        return _Path(
            runner=runner,
            sampler=sampler,
            heads=self.drafts,
            stepped_heads=None,
            torch_threads=contextlib.nullcontext,
            is_asynchronous=True,
            max_rows_ahead=parts.sampled.num_rows,
            clock=lambda: self.clock.now,
            phases=(
                Phase(runner, "forward", "fill"),
                Phase(sampler, "launch", "sample"),
                Phase(sampler, "collect", "sample"),
                Phase(self.clock, "wait", "wait"),
            ),
            graphs=parts.graphs,
            times=self.clock.times,
        )

    def _put_on_the_clock(self, sampled: SampledTokens) -> None:
        """What is copied to the host is there when the device has come so far."""
        queue_download, read = sampled.queue_download, sampled.read
        due: dict[int, float] = {}

        def queue_on_clock() -> HostPage:
            copy = queue_download()
            due[id(copy)] = self.clock.busy_until
            return copy

        def read_on_clock(copy: HostPage, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
            self.clock.wait(due[id(copy)])
            return read(copy, num_rows)

        sampled.queue_download = queue_on_clock  # type: ignore[method-assign]
        sampled.read = read_on_clock  # type: ignore[method-assign]

    def sample(self) -> None:
        for group in self.groups:
            rows = self.script.rows(group)
            self._sampled.tokens[group.first_row : group.first_row + len(rows)] = torch.tensor(rows)

    def draft(self, num_guesses: int) -> None:
        guesses, probabilities = self.drafts.outputs
        for idx, group in enumerate(self.drafts.drafting_groups):
            rows = self.script.rows(group)
            num_accepted = next((i for i, d in enumerate(group.drafts) if d != rows[i]), len(group.drafts))
            guesses[idx, :num_guesses] = torch.tensor(
                self.script.guesses(group.seq, num_accepted, num_guesses), dtype=torch.int32
            )
            probabilities[idx, :num_guesses] = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class _Path(ComputePath):
    times: DeviceTimes

    def seconds(
        self, blocks: BlockManager, max_model_len: int, num_rows: int, num_seqs: int = 1, context_len: int = 0
    ) -> float:
        return self.times.layers(num_rows)


class _Graphs(GraphCache):
    """Puts what is asked for on the clock, and leaves the results where the kernels would."""

    def __init__(self, stand_in: StandIn):
        super().__init__(torch.device("cpu"), False)
        self._stand_in = stand_in

    def launch(self, key: Hashable, part: Callable[[], None], eager_reason: str | None = None) -> None:
        clock = self._stand_in.clock
        if isinstance(key, Bucket):
            clock.queue_step(key.num_rows)
        elif isinstance(key, tuple) and key[0] == "sample":
            with clock.standing_still():
                self._stand_in.sample()
        elif isinstance(key, tuple) and key[0] == "heads":
            clock.queue(clock.times.heads_s)
            with clock.standing_still():
                self._stand_in.draft(key[2])


class _Drafts(DeviceDrafts):
    @property
    def drafting_groups(self) -> list[RowGroup]:
        return self._groups

    @property
    def outputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._heads.guesses, self._heads.probabilities


class _Sampler(DeviceSampler):
    def __init__(self, stand_in: StandIn, inputs: PathInputs, parts: DeviceParts, drafts: DeviceDrafts):
        super().__init__(inputs.eos_token_ids, inputs.masks, parts, drafts)
        self._stand_in = stand_in

    def launch(self, logits: torch.Tensor, groups: Sequence[RowGroup]) -> PendingSample:
        self._stand_in.groups = groups
        return super().launch(logits, groups)
