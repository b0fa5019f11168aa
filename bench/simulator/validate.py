"""How far is the simulator from an engine that serves the same requests?

The engine runs in this process on one thread and a clock of its own: a step takes the CPU time that it took, nothing
passes between two steps, and requests arrive by that clock. So other processes hardly matter, and the simulator gets
exactly the same trace. Its costs are fitted to the steps of one trace and it is compared on others, of other loads:
Poisson arrivals, Zipf over adapters that are all in memory, no drafts. The limit is printed first: how far the table of
costs is from the engine's single steps.

    python -m bench.simulator.validate [--model DIR] [--adapters 16] [--requests 120]
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import click
import numpy as np

from specserve.config import EngineConfig
from specserve.engine.engine import Engine
from specserve.messages import GenerateRequest, RequestFailed, SamplingParams, Speculation
from specserve.schedule.scheduler import ScheduledSequence

from .. import common, options
from ..adapter_files import make_adapters
from ..tasks import BaseModel
from .costs import FittedCosts, Step
from .replica import Outcome, Replica
from .run import kind_figures, simulate
from .trace import Lengths, SimulatedRequest, poisson

LOADS = (0.5, 0.8, 1.3)  # of what the engine can serve
TTFT_S, TOKEN_S = 1.0, 0.1


class EngineRun:
    """An engine on a clock that only its steps move; `steps` and `seconds` are of all of them."""

    def __init__(self, engine: Engine, hashes: Sequence[str]):
        self._engine, self._hashes = engine, hashes
        self._now = 0.0
        self.steps: list[Step] = []
        self.seconds: list[float] = []
        engine.scheduler.clock = lambda: self._now
        self._schedule = engine.scheduler.schedule
        engine.scheduler.schedule = self._noted  # type: ignore[method-assign]

    def _noted(self, *args: Any, **kwargs: Any) -> list[ScheduledSequence]:
        items = self._schedule(*args, **kwargs)
        adapters = {item.seq.adapter_hash for item in items}
        rows, keys = sum(item.num_rows for item in items), sum(item.seq.num_computed for item in items)
        self.steps.append(Step(rows, len(items), len(adapters), keys))
        return items

    def run(self, trace: Sequence[SimulatedRequest], name: str) -> list[Outcome]:
        engine, outcomes, added_s = self._engine, [Outcome(request) for request in trace], [0.0] * len(trace)
        self._now, idx = 0.0, 0
        while idx < len(trace) or engine.has_work():
            while idx < len(trace) and (trace[idx].arrival_s <= self._now or not engine.has_work()):
                self._now = added_s[idx] = max(self._now, trace[idx].arrival_s)
                engine.add_request(self._as_sent(trace[idx], name, idx))
                idx += 1
            start = time.thread_time()
            events = engine.step()
            self.seconds.append(time.thread_time() - start)
            self._now += self.seconds[-1]
            for event in events:
                if isinstance(event, RequestFailed):
                    raise click.ClickException(event.error.message)
                which = int(event.request_id.rpartition("-")[2])
                outcome = outcomes[which]
                outcome.first_token_s = self._now if outcome.first_token_s is None else outcome.first_token_s
                if event.usage is not None:
                    outcome.admitted_s, outcome.end_s = added_s[which] + event.usage.queue_s, self._now
        return outcomes

    def _as_sent(self, request: SimulatedRequest, name: str, idx: int) -> GenerateRequest:
        rng = random.Random(f"{name}/{idx}")
        return GenerateRequest(
            f"{name}-{idx}",
            [rng.randrange(1000, 5000) for _ in range(request.prompt_len)],
            SamplingParams(max_tokens=request.output_len, temperature=0.0, ignore_eos=True),
            adapter_hash=self._hashes[request.adapter],
            speculation=Speculation("off"),
        )


@click.command(help=__doc__.partition("\n")[0])
@options.model
@options.at_least(1, "--adapters", 16)
@options.at_least(8, "--requests", 120, "Of each trace.")
@options.at_least(1, "--max-num-seqs", 16)
@options.at_least(1, "--prompt", 120, "Mean tokens.")
@options.at_least(1, "--output", 32, "Mean tokens.")
@options.save("simulator_validation")
def main(model: str, adapters: int, requests: int, max_num_seqs: int, prompt: int, output: int, save: bool) -> None:
    run = common.start("simulator_validation", "torch", "numpy")
    base = BaseModel.load(model)
    config = EngineConfig(
        model=str(base.path), device="cpu", kv_cache_gib=0.5, max_model_len=2 * (prompt + output),
        max_num_seqs=max_num_seqs, max_batched_tokens=256, max_prefill_rows=64, max_adapters=adapters,
        speculation="off", num_threads=1,
    )  # fmt: skip
    engine = Engine(config, base.path)
    loras = make_adapters(engine, adapters, 8, ["q_proj", "v_proj"])
    for lora in loras:
        engine.adapters.register(lora)
    real = EngineRun(engine, [lora.content_hash for lora in loras])
    lengths, names = Lengths(prompt, output), range(adapters)
    saturated = make_trace(requests, 1e6, names, "saturated", lengths)
    rate = requests / max(outcome.end_s or 0.0 for outcome in real.run(saturated, "saturated"))
    real.run(make_trace(requests, 0.7 * rate, names, "fit", lengths), "fit")
    costs = FittedCosts.fit(real.steps, real.seconds)
    predicted = np.array([costs.seconds(step) for step in real.steps])
    noise = float(np.median(np.abs(np.array(real.seconds) / predicted - 1)))
    click.echo(f"{rate:.2f} requests/s at most; a step differs from the table by {100 * noise:.0f}% in the median")
    levels = []
    for load in LOADS:
        trace = make_trace(requests, load * rate, names, f"load {load}", lengths)
        measured = _figures(real.run(trace, f"load {load}"))
        replica = Replica(costs, engine.config, engine.info.num_kv_blocks, 0.0)
        for idx in names:
            replica.hold(idx)
        simulated = _figures(simulate(trace, [replica]).outcomes)
        ratios = {
            name: {key: round(simulated[name][key] / value, 3) for key, value in measured[name].items() if value}
            for name in ("ttft_s", "token_s", "end_to_end_s")
        }
        ratios["tokens_per_s"] = round(simulated["tokens_per_s"] / measured["tokens_per_s"], 3)
        levels.append({"load": load, "ratio": ratios, "measured": measured, "simulated": simulated})
        click.echo(f"load {load}, simulated / measured: {ratios}")
    settings = {
        "model": base.name, "dtype": engine.info.dtype, "adapters": adapters, "requests": requests,
        "rate": round(rate, 3), "max_num_seqs": max_num_seqs, "prompt": prompt, "output": output, "threads": 1,
    }  # fmt: skip
    run.finish({**settings, "step_noise": round(noise, 4), "costs": asdict(costs), "levels": levels}, save)


def make_trace(
    num: int, rate: float, adapters: range, seed: str, lengths: Lengths, zipf_exponent: float = 1.0
) -> list[SimulatedRequest]:
    """Outputs are as long as they may be."""
    drawn = poisson(num, rate, adapters, seed, zipf_exponent=zipf_exponent, lengths=lengths)
    return [replace(request, max_tokens=request.output_len) for request in drawn]


def _figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    return kind_figures(outcomes, max(outcome.end_s or 0.0 for outcome in outcomes), TTFT_S, TOKEN_S)


if __name__ == "__main__":
    main()
