"""Do two real replicas find adapters as often as the simulation says, for each way to spread requests?

Two engine processes of a random tiny model behind the front's own code (`specserve.ray`), without Ray between them, and
the simulation with the same requests, the same routing code, step times fitted to such an engine, and the time that the
real ones took to read an adapter: small LoRAs that are all different, by Zipf, of which each replica holds few. How
often an adapter is found hardly depends on what else the machine does; latencies do.

    python -m bench.simulator.real_replicas [--adapters 300] [--places 48] [--requests 2000] [--rate 40]
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import msgspec

from specserve.config import EngineConfig, ServeConfig, engine_part
from specserve.engine.engine import Engine
from specserve.errors import UserError
from specserve.messages import GenerateRequest, SamplingParams, Speculation
from specserve.ray.engine_host import EngineHost
from specserve.ray.policy import AffinityPolicy, Route
from specserve.ray.replicated_engine import ReplicatedEngine
from specserve.schedule.waiting import WaitingQueue

from .. import common, options
from ..random_service import write_service
from ..shapes import TINY
from .costs import FittedCosts
from .replica import Replica
from .replicas import Affinity, AtRandom, LeastLoaded, Router
from .run import figures, simulate
from .trace import Lengths, SimulatedRequest
from .validate import EngineRun, make_trace

NAMES = ("0", "1")
SHAPE = replace(TINY, vocab_size=8192)


class _Chosen(AffinityPolicy):
    """Chooses without a look at who has what; what nobody has is read where the request goes."""

    def __init__(self) -> None:
        super().__init__()
        self._read_at: dict[str, str] = {}

    def choose(self) -> str:
        raise NotImplementedError

    def home(self, adapter: str, refusing: Any = ()) -> str | None:
        """Of an adapter by its path, as its content is not known yet."""
        self._read_at[adapter] = self.choose()
        return self._read_at[adapter]

    def was_loaded(self, path: str, adapter: str) -> None:
        """The request that asked for it goes there."""
        if path in self._read_at:
            self._read_at[adapter] = self._read_at.pop(path)

    def route(self, adapter: str | None, cost: int, prefixes: Any = (), holders: Any = (), refusing: Any = ()) -> Route:
        name = self._read_at.pop(adapter or "", None) or self.choose()
        return Route(name, name in holders)


class _AtRandom(_Chosen):
    def __init__(self) -> None:
        super().__init__()
        self._rng = random.Random("replicas")

    def choose(self) -> str:
        return self._rng.choice(NAMES)


class _LeastLoaded(_Chosen):
    def choose(self) -> str:
        return min(NAMES, key=self.loads.__getitem__)


WAYS: dict[str, tuple[type[AffinityPolicy], type[Router]]] = {
    "random": (_AtRandom, AtRandom),
    "least loaded": (_LeastLoaded, LeastLoaded),
    "affinity": (AffinityPolicy, Affinity),
}


class _Front:
    """Real replicas, asked as the server asks: an adapter that nobody has is loaded once, however many want it."""

    def __init__(self, config: ServeConfig, model_dir: Path, adapters_dir: Path, policy: AffinityPolicy):
        self._hosts = {name: EngineHost(config, model_dir) for name in NAMES}
        self.engine = ReplicatedEngine(config, self._hosts.__getitem__, policy)
        self.engine.on_adapters_left = self._left
        self._adapters_dir, self._policy = adapters_dir, policy
        self._hashes: dict[int, str] = {}
        self._loading: dict[int, asyncio.Task[str]] = {}
        self.load_s: list[float] = []

    async def __aenter__(self) -> _Front:
        await asyncio.gather(*(host.start() for host in self._hosts.values()))
        self.engine.set_replicas(NAMES)
        await self.engine.start()
        while len(self.engine.replicas()) < len(NAMES):
            await asyncio.sleep(0.05)
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.engine.stop()
        await asyncio.gather(*(host.stop() for host in self._hosts.values()))

    def _left(self, placements: dict[str, int]) -> None:
        for adapter, content_hash in list(self._hashes.items()):
            if content_hash in placements:
                del self._hashes[adapter]

    async def _load(self, adapter: int) -> str:
        start, name = time.perf_counter(), f"random-{adapter}"
        path = str(self._adapters_dir / name)
        answer = await self.engine.load_adapter(name, path)
        if isinstance(self._policy, _Chosen):
            self._policy.was_loaded(path, answer.adapter.content_hash)
        self.load_s.append(time.perf_counter() - start)
        self._hashes[adapter] = answer.adapter.content_hash
        return self._hashes[adapter]

    async def _hash(self, adapter: int) -> str:
        if adapter in self._hashes:
            return self._hashes[adapter]
        if adapter not in self._loading:
            self._loading[adapter] = task = asyncio.create_task(self._load(adapter))
            task.add_done_callback(lambda _: self._loading.pop(adapter))
        return await asyncio.shield(self._loading[adapter])

    async def ask(self, request: SimulatedRequest, idx: int) -> float:
        """Seconds to its first token."""
        rng, start = random.Random(idx), time.perf_counter()
        shared = random.Random(-1 - request.adapter)
        prompt = [shared.randrange(1000, 5000) for _ in range(request.shared_len)]
        prompt += [rng.randrange(1000, 5000) for _ in range(request.prompt_len - len(prompt))]
        sampling = SamplingParams(max_tokens=request.output_len, temperature=0.0, ignore_eos=True)
        first = None
        while first is None:
            made = GenerateRequest(
                f"r{idx}", prompt, sampling, adapter_hash=await self._hash(request.adapter),
                speculation=Speculation("off"),
            )  # fmt: skip
            try:
                async for _ in self.engine.generate(made):
                    first = first or time.perf_counter()
            except UserError as error:
                if error.code != "adapter_not_resident":
                    raise
                self._hashes.pop(request.adapter, None)  # it made room meanwhile
        return first - start

    async def num_loads(self) -> int:
        stats = await self.engine.stats()
        assert stats is not None
        return stats.num_adapter_loads


async def _real(
    trace: Sequence[SimulatedRequest], config: ServeConfig, model_dir: Path, adapters_dir: Path, policy: AffinityPolicy
) -> dict[str, Any]:
    async with _Front(config, model_dir, adapters_dir, policy) as front:
        begin = time.perf_counter()
        tasks = []
        for idx, request in enumerate(trace):
            await asyncio.sleep(max(0.0, begin + request.arrival_s - time.perf_counter()))
            tasks.append(asyncio.create_task(front.ask(request, idx)))
        first_s = await asyncio.gather(*tasks)
        await asyncio.sleep(1.5)  # the engines tell of themselves once a second
        loads = await front.num_loads()
        return {
            "hit_rate": round(1 - loads / len(trace), 4),
            "loads": loads,
            "ttft_s": {"p50": round(statistics.median(first_s), 4)},
            "load_s": round(statistics.median(front.load_s), 4),
        }


def _costs(config: EngineConfig, model_dir: Path, adapters_dir: Path, lengths: Lengths) -> tuple[FittedCosts, float]:
    """Fitted to the steps of an engine in this process, and the requests a second that it serves at most."""
    engine = Engine(config, model_dir)
    for idx in range(16):
        engine.adapters.register(engine.adapters.read(f"random-{idx}", adapters_dir / f"random-{idx}"))
    real = EngineRun(engine, list(engine.adapters.registry.adapters))
    names = range(16)
    saturated = make_trace(200, 1e6, names, "saturated", lengths)
    rate = len(saturated) / max(outcome.end_s or 0.0 for outcome in real.run(saturated, "saturated"))
    real.run(make_trace(200, 0.7 * rate, names, "fit", lengths), "fit")
    return FittedCosts.fit(real.steps, real.seconds), rate


def _simulated(
    trace: Sequence[SimulatedRequest], config: EngineConfig, costs: FittedCosts, kind: type[Router], lengths: Lengths,
    load_s: float,
) -> dict[str, Any]:  # fmt: skip
    replicas = [Replica(costs, config, 4096, load_s, WaitingQueue) for _ in NAMES]
    result = simulate(trace, replicas, kind(replicas, lengths, load_s))
    of = figures(result, ttft_s=1.0, token_s=0.1)
    return {
        "hit_rate": round(1 - of["loads"] / len(trace), 4),
        "loads": of["loads"],
        "ttft_s": {"p50": of["kinds"]["all"]["ttft_s"]["p50"]},
    }


@click.command(help=__doc__.partition("\n")[0])
@options.at_least(16, "--adapters", 300)
@options.at_least(1, "--places", 48, "Adapters in a replica's memory.")
@options.at_least(100, "--requests", 2000, "Of each way.")
@options.at_least(1, "--rate", 40, "Requests a second.")
@options.at_least(1, "--prompt", 48, "Mean tokens.")
@options.at_least(1, "--output", 16, "Mean tokens.")
@click.option("--zipf", type=float, default=1.0, show_default=True, help="Exponent of the adapters' popularity.")
@options.save("replicas_real")
def main(
    adapters: int, places: int, requests: int, rate: int, prompt: int, output: int, zipf: float, save: bool
) -> None:
    run = common.start("replicas_real", "torch", "numpy")
    lengths = Lengths(prompt, output)
    trace = make_trace(requests, rate, range(adapters), "replicas", lengths, zipf)
    distinct = len({request.adapter for request in trace})
    click.echo(f"limit: {100 * (1 - distinct / requests):.1f}% could find their adapter: {distinct} are asked for")
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="specserve-") as folder:
        model_dir, adapters_dir = Path(folder) / "model", Path(folder) / "adapters"
        write_service(SHAPE, Path(folder), adapters, 4, ("q_proj", "v_proj"))
        config = ServeConfig(
            model=str(model_dir), device="cpu", kv_cache_gib=0.05, max_model_len=512, max_num_seqs=16,
            max_batched_tokens=256, max_prefill_rows=64, max_adapters=places, adapter_memory_gib=0.1, num_threads=1,
            speculation="off", log_level="warning",
        )  # fmt: skip
        settings = engine_part(config)
        costs, most = _costs(
            msgspec.structs.replace(settings, max_adapters=max(16, places)), model_dir, adapters_dir, lengths
        )
        click.echo(f"an engine alone serves {most:.0f} requests/s at most; asked are {rate} of both")
        for way, (policy, router) in WAYS.items():
            real = asyncio.run(_real(trace, config, model_dir, adapters_dir, policy()))
            simulated = _simulated(trace, settings, costs, router, lengths, real["load_s"])
            found[way] = {"real": real, "simulated": simulated}
            click.echo(
                f"{way}: real {100 * real['hit_rate']:.1f}% found their adapter ({real['loads']} loads, "
                f"{1e3 * real['load_s']:.0f} ms each), TTFT p50 {1e3 * real['ttft_s']['p50']:.0f} ms; simulated "
                f"{100 * simulated['hit_rate']:.1f}% ({simulated['loads']}), {1e3 * simulated['ttft_s']['p50']:.0f} ms"
            )
    fields = {
        "adapters": adapters, "distinct": distinct, "places": places, "requests": requests, "rate": rate,
        "prompt": prompt, "output": output, "zipf": zipf, "engine_rate": round(most, 1),
    }  # fmt: skip
    run.finish({**fields, "costs": asdict(costs), "ways": found}, save)


if __name__ == "__main__":
    main()
