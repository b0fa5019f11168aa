"""Traces through replicas, and what came of them: latencies by kind, fairness, goodput, adapters that were read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .replica import Outcome, Replica
from .trace import SimulatedRequest

WINDOW_S, LOOK_S = 30.0, 0.5  # over which it is looked at who was served, and how often who waits
Route = Callable[[SimulatedRequest, Sequence[Replica]], Replica]


@dataclass(slots=True)
class Result:
    """Outcomes in order of arrival; `shares` are tokens served in a window, of adapters that waited throughout it."""

    outcomes: list[Outcome]
    replicas: Sequence[Replica]
    end_s: float
    cpu_s: float  # that the simulation took
    shares: list[list[int]] = field(default_factory=list)


def simulate(trace: Sequence[SimulatedRequest], replicas: Sequence[Replica], route: Route | None = None) -> Result:
    """Run until the last request is answered; each replica has its own time, and the one that is behind goes next."""
    begin = time.thread_time()
    outcomes: list[Outcome] = []
    result = Result(outcomes, replicas, 0.0, 0.0)
    windows = [_Window(replica) for replica in replicas]
    idx = 0
    while True:
        nexts = [replica.next_s for replica in replicas]
        soonest = min(nexts)
        if idx < len(trace) and trace[idx].arrival_s <= soonest:
            request = trace[idx]
            idx += 1
            replica = replicas[0] if route is None else route(request, replicas)
            replica.now = max(replica.now, request.arrival_s)
            outcomes.append(replica.submit(request))
            continue
        if soonest == float("inf"):
            break
        which = nexts.index(soonest)
        replicas[which].now = soonest
        replicas[which].turn()
        windows[which].look(result.shares)
    result.end_s = max(replica.now for replica in replicas)
    result.cpu_s = time.thread_time() - begin
    return result


class _Window:
    """Who was served how much while it waited: of adapters, and priorities, that had some waiting at every look."""

    def __init__(self, replica: Replica):
        self._replica = replica
        self._next_look = LOOK_S
        self._start_window()

    def _start_window(self) -> None:
        self._end = self._replica.now + WINDOW_S
        self._always_waited: set[tuple[int, int]] | None = None
        self._served = self._replica.served.copy()

    def look(self, shares: list[list[int]]) -> None:
        replica = self._replica
        if replica.now < self._next_look:
            return
        self._next_look = replica.now + LOOK_S
        waiting = {(seq.owner.request.adapter, seq.priority) for seq in replica.scheduler.waiting}
        self._always_waited = waiting if self._always_waited is None else self._always_waited & waiting
        if replica.now >= self._end:
            if len(self._always_waited) > 1:
                shares.append([replica.served[key] - self._served[key] for key in sorted(self._always_waited)])
            self._start_window()


def jain(values: Sequence[float]) -> float:
    """1 where all are equal, 1 / n where one has everything (Jain et al. 1984)."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0


def figures(result: Result, ttft_s: float, token_s: float) -> dict[str, Any]:
    """Figures of all requests and of each kind; goodput counts those that met both targets."""
    registry = [replica.registry for replica in result.replicas]
    kinds = sorted({outcome.request.kind for outcome in result.outcomes})
    estimates = [
        (o.expected_wait_s, o.admitted_s - o.added_s)
        for o in result.outcomes
        if o.expected_wait_s is not None
        and o.added_s is not None
        and o.admitted_s is not None
        and o.admitted_s - o.added_s > 1.0
    ]
    return {
        "seconds": round(result.end_s, 3),
        "num_steps": sum(r.num_steps for r in result.replicas),
        "num_preemptions": sum(r.scheduler.num_preemptions for r in result.replicas),
        "loads": sum(r.counts.num_loads for r in registry),
        "evictions": sum(r.counts.num_evictions for r in registry),
        "asked_to_leave": sum(r.counts.num_asked for r in registry),
        "jain": round(float(np.mean([jain(share) for share in result.shares])), 3) if result.shares else None,
        "num_windows": len(result.shares),
        "wait_estimate_ratio": _percentiles([expected / waited for expected, waited in estimates]),
        "kinds": {
            kind: kind_figures([o for o in result.outcomes if o.request.kind == kind], result.end_s, ttft_s, token_s)
            for kind in kinds
        },
        "cpu_s": round(result.cpu_s, 2),
        "requests_a_cpu_minute": round(60 * len(result.outcomes) / result.cpu_s),
    }


def kind_figures(outcomes: Sequence[Outcome], end_s: float, ttft_s: float, token_s: float) -> dict[str, Any]:
    """Of requests that all ended, by `end_s`; waits and latencies are of those that succeeded."""
    ok = [o for o in outcomes if o.error is None and o.end_s is not None]
    assert len(ok) + sum(o.error is not None for o in outcomes) == len(outcomes), "some request got no answer"
    first = [_since(o, o.first_token_s) for o in ok]
    per_token = [
        (o.end_s - o.first_token_s) / max(1, o.request.output_len - 1)
        for o in ok
        if o.end_s is not None and o.first_token_s is not None
    ]
    good = sum(a <= ttft_s and b <= token_s for a, b in zip(first, per_token, strict=True))
    return {
        "num": len(outcomes),
        "tokens_per_s": round(sum(o.request.output_len for o in ok) / end_s, 2),
        "errors": dict(Counter(o.error for o in outcomes if o.error is not None)),
        "wait_s": _percentiles([_since(o, o.admitted_s) for o in ok]),
        "ttft_s": _percentiles(first),
        "token_s": _percentiles(per_token),
        "end_to_end_s": _percentiles([_since(o, o.end_s) for o in ok]),
        "goodput_per_s": round(good / end_s, 3),
        "good_share": round(good / len(outcomes), 4),
    }


def _since(outcome: Outcome, at_s: float | None) -> float:
    assert at_s is not None
    return at_s - outcome.request.arrival_s


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99), method="inverted_cdf")
    named = {"mean": float(np.mean(values)), "p50": p50, "p90": p90, "p99": p99, "max": max(values)}
    return {name: round(float(value), 4) for name, value in named.items()}
