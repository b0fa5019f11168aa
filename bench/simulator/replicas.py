"""How should requests for very many adapters be spread over replicas: at random, by load, or by who has the adapter?

The engine's own scheduler, KV blocks and adapter places on a simulated clock (`replica`), several of them, and the
routing policy that `specserve ray` runs (`specserve.ray.policy`), at the same requests: Poisson arrivals, Zipf over all
adapters, at shares of what all replicas together can serve of adapters that are in memory, which is printed first.

- random: any replica
- least loaded: who owes the fewest tokens
- affinity: who has the adapter, then who has the start of the prompt, then who owes the fewest tokens
- affinity, one copy: the same, and no adapter has another copy

    python -m bench.simulator.replicas [--replicas 8] [--adapters 100000] [--requests 20000] \
        [--plot docs/images/replicas.png]
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from specserve.ray.policy import PREFIX_WEIGHT, AffinityPolicy
from specserve.schedule.waiting import WaitingQueue

from .. import common, options
from .__main__ import saturated_rate
from .costs import FittedCosts
from .replica import Outcome, Replica, config_of
from .run import figures, simulate
from .trace import Lengths, SimulatedRequest, poisson


class Router:
    """Chooses replicas for one simulation, as a front does; counts what requests found there."""

    def __init__(self, replicas: Sequence[Replica], lengths: Lengths, load_s: float):
        self._replicas, self._lengths, self._load_s = replicas, lengths, load_s
        self._names = [str(idx) for idx in range(len(replicas))]
        self.policy = AffinityPolicy()
        self.policy.set_replicas(self._names)
        self.num_hits = self.num_requests = self.num_copies = 0
        for name, one in zip(self._names, replicas, strict=True):
            one.on_end = lambda outcome, name=name, one=one: self.policy.ended(  # type: ignore[misc]
                name, self._cost(outcome.request), one.now
            )
            one.on_left = lambda key, name=name: self.policy.left(name, key)  # type: ignore[misc]

    def _cost(self, request: SimulatedRequest) -> int:
        return math.ceil(PREFIX_WEIGHT * request.prompt_len + self._lengths.output)

    def __call__(self, request: SimulatedRequest, replicas: Sequence[Replica]) -> Replica:
        name = self.choose(request)
        self.policy.began(name, self._cost(request), request.arrival_s)
        found = replicas[int(name)]
        self.num_requests += 1
        if found.has(request.adapter):
            self.num_hits += 1
        else:
            self.policy.was_read(self._load_s)
        return found

    def choose(self, request: SimulatedRequest) -> str:
        raise NotImplementedError


class AtRandom(Router):
    def __init__(self, *args: Any):
        super().__init__(*args)
        self._rng = random.Random("replicas")

    def choose(self, request: SimulatedRequest) -> str:
        return self._rng.choice(self._names)


class LeastLoaded(Router):
    def choose(self, request: SimulatedRequest) -> str:
        return min(self._names, key=self.policy.loads.__getitem__)


class Affinity(Router):
    def choose(self, request: SimulatedRequest) -> str:
        adapter = f"adapter-{request.adapter}"
        holders = [name for name in self._names if self._replicas[int(name)].has(request.adapter)]
        starts = [adapter.encode()] if request.shared_len else []
        route = self.policy.route(adapter, self._cost(request), starts, holders)
        assert route is not None
        self.num_copies += bool(holders) and not route.has_adapter
        return route.replica


class OneCopy(Affinity):
    def choose(self, request: SimulatedRequest) -> str:
        return next(
            (name for name in self._names if self._replicas[int(name)].has(request.adapter)), super().choose(request)
        )


ROUTERS: dict[str, type[Router]] = {
    "random": AtRandom, "least loaded": LeastLoaded, "affinity": Affinity, "affinity, one copy": OneCopy,
}  # fmt: skip


@click.command(help=__doc__.partition("\n")[0])
@options.at_least(1, "--replicas", 8)
@options.at_least(2, "--adapters", 100_000)
@options.at_least(1, "--places", 256, "Adapters in a replica's memory.")
@options.at_least(100, "--requests", 20_000, "Of each run.")
@options.numbers("--loads", "50,80,95", "Percent of what can be served.")
@options.at_least(1, "--max-num-seqs", 16)
@options.at_least(1, "--prompt", 120, "Mean tokens.")
@options.at_least(1, "--output", 32, "Mean tokens.")
@options.at_least(0, "--shared", 32, "Tokens at the start of all prompts of an adapter.")
@options.at_least(0, "--load-ms", 100, "To read an adapter.")
@click.option("--zipf", type=float, default=1.0, show_default=True, help="Exponent of the adapters' popularity.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write a PNG.")
@options.save("replicas_simulated")
def main(
    replicas: int, adapters: int, places: int, requests: int, loads: list[int], max_num_seqs: int, prompt: int,
    output: int, shared: int, load_ms: int, zipf: float, plot: Path | None, save: bool,
) -> None:  # fmt: skip
    run = common.start("replicas_simulated", "numpy")
    costs, lengths = FittedCosts.saved(), Lengths(prompt, output)
    config = config_of(max_num_seqs, places)

    def replica() -> Replica:
        return Replica(costs, config, 4096, load_ms / 1e3, WaitingQueue)

    rate = replicas * saturated_rate(replica(), min(places, 32), lengths)
    click.echo(f"limit: {rate:.2f} requests/s of {replicas} replicas, of 32 adapters that are all in memory")
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in ROUTERS}
    for load in loads:
        trace = [
            replace(request, shared_len=min(shared, request.prompt_len))
            for request in poisson(
                requests, load / 100 * rate, range(adapters), "replicas", zipf_exponent=zipf, lengths=lengths
            )
        ]
        for name, kind in ROUTERS.items():
            of = found[name][load] = _figures(trace, [replica() for _ in range(replicas)], kind, lengths, load_ms / 1e3)
            click.echo(
                f"load {load}%, {name}: {100 * of['hit_rate']:.1f}% found their adapter, {of['loads']} loads, "
                f"TTFT p50 {of['ttft_s']['p50']:.2f} p99 {of['ttft_s']['p99']:.2f} s, whole p99 "
                f"{of['end_to_end_s']['p99']:.2f} s, {of['tokens_per_s']:.0f} tokens/s"
            )
    if plot is not None:
        from .replica_plots import write_plot

        write_plot(found, plot)
    settings = {
        "replicas": replicas, "adapters": adapters, "places": places, "requests": requests,
        "max_num_seqs": max_num_seqs, "prompt": prompt, "output": output, "shared": shared, "load_ms": load_ms,
        "zipf": zipf, "rate": round(rate, 3),
    }  # fmt: skip
    run.finish({**settings, "costs": asdict(costs), "figures": found}, save)


def _figures(
    trace: list[SimulatedRequest], replicas: list[Replica], kind: type[Router], lengths: Lengths, load_s: float
) -> dict[str, Any]:
    router = kind(replicas, lengths, load_s)
    result = simulate(trace, replicas, router)
    of = figures(result, ttft_s=2.0, token_s=0.2)
    served = [one.generated_tokens for one in replicas]
    outcomes: list[Outcome] = result.outcomes
    assert all(outcome.error is None for outcome in outcomes)
    return {
        "hit_rate": round(router.num_hits / router.num_requests, 4),
        "loads": of["loads"],
        "copies": router.num_copies,
        "evictions": of["evictions"],
        "computed_prompt_tokens": sum(one.prompt_tokens for one in replicas),
        "most_over_mean_tokens": round(max(served) * len(served) / sum(served), 3),
        **{name: of["kinds"]["all"][name] for name in ("ttft_s", "token_s", "end_to_end_s", "tokens_per_s")},
        "cpu_s": of["cpu_s"],
    }


if __name__ == "__main__":
    main()
