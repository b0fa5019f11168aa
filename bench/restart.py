"""How long is a server without an answer when its engine is killed, and how long does a server take to its first one?

In each round a server starts, answers, and has its engine killed (`kill -9`); then the same is asked at once. What is
timed, with and without adapters in turn:

    cold      from the command `specserve serve` to its line "is ready", and to the first answers
    restart   from the kill to /health 200, and to the same answers from the next engine

With adapters each of them is asked at the same time, and the last answer counts: the next engine has to load them all.
Greedy, and another answer than before ends the bench. Beside the times stands the CPU time of the next engine until
then, which other work on the machine changes less. The limit is printed first: a process that imports torch, and no
more. Wanted: the same answer in less than 10 s on quiet cores.

    python -m bench.restart [--adapters-dir examples/adapters] [--rounds 5]
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import click

from . import common, options
from .server_process import START_S, Serving, cpu_s, serving
from .tasks import EXAMPLES, BaseModel

PROMPT = "The morning train left the station before the river"
POLL_S = 0.01


@dataclass(slots=True)
class Case:
    """A way to serve, and the seconds of each round."""

    name: str
    models: list[str]  # that are asked
    flags: list[str]
    ready_s: list[float] = field(default_factory=list)
    first_answer_s: list[float] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    same_answer_s: list[float] = field(default_factory=list)
    engine_cpu_s: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        cold = {"ready_s": common.spread(self.ready_s), "answer_s": common.spread(self.first_answer_s)}
        restart = {
            "health_s": common.spread(self.health_s),
            "answer_s": common.spread(self.same_answer_s),
            "engine_cpu_s": common.spread(self.engine_cpu_s),
        }
        return {"cold": cold, "restart": restart}


@click.command(help=__doc__.partition("\n")[0])
@options.model
@click.option("--adapters-dir", type=options.ADAPTER, default=EXAMPLES / "adapters", help="Default: the demo adapters.")
@options.rounds(5)
@options.at_least(1, "--max-tokens", 16, "Of an answer.")
@options.save("restart")
def main(model: str, adapters_dir: Path, rounds: int, max_tokens: int, save: bool) -> None:
    run = common.start("restart", "torch")
    base = BaseModel.load(model)
    names = sorted(path.parent.name for path in adapters_dir.glob("*/adapter_config.json"))
    if not names:
        raise click.UsageError(f"--adapters-dir {adapters_dir.name!r} holds no adapter; name a folder of such")
    limit_s = torch_import_s()
    click.echo(f"limit: to import torch takes {limit_s:.1f} s of CPU time")
    cases = [Case("base", [base.path.name], []), Case("adapters", names, ["--adapters-dir", str(adapters_dir)])]
    for round_idx in range(rounds):
        for case in cases[:: 1 if round_idx % 2 == 0 else -1]:
            start_s = time.perf_counter()
            with serving(str(base.path), *case.flags) as server:
                case.ready_s.append(time.perf_counter() - start_s)
                asyncio.run(measure(case, server, start_s, max_tokens))
            click.echo(
                f"round {round_idx + 1}, {case.name}: ready after {case.ready_s[-1]:.1f} s, answered after "
                f"{case.first_answer_s[-1]:.1f} s; killed, healthy after {case.health_s[-1]:.1f} s, answered after "
                f"{case.same_answer_s[-1]:.1f} s ({case.engine_cpu_s[-1]:.1f} s of CPU time)"
            )
    figures = {case.name: case.figures() for case in cases}
    settings = {"model": base.name, "num_adapters": len(names), "rounds": rounds, "max_tokens": max_tokens}
    run.finish({**settings, "torch_import_cpu_s": round(limit_s, 2), "figures": figures}, save)


async def measure(case: Case, server: Serving, start_s: float, max_tokens: int) -> None:
    """The first answers of a server that is ready, then those after a kill."""
    timeout = aiohttp.ClientTimeout(total=START_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        before = await answers(session, server.url, case.models, max_tokens)
        case.first_answer_s.append(time.perf_counter() - start_s)
        pid = server.engine_pid()
        assert pid is not None, "a server that answers has an engine"
        start_s = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        health = asyncio.create_task(healthy_again(session, server.url))
        after = await answers(session, server.url, case.models, max_tokens)
        case.same_answer_s.append(time.perf_counter() - start_s)
        if (pid := server.engine_pid()) is not None:
            case.engine_cpu_s.append(cpu_s(pid))
        case.health_s.append(await health - start_s)
    if after != before:
        raise click.ClickException(f"{case.name}: the next engine answers {after!r} instead of {before!r}")


async def answers(session: aiohttp.ClientSession, url: str, models: list[str], max_tokens: int) -> list[str]:
    """Of all `models`, asked at the same time."""
    return await asyncio.gather(*(answer(session, url, model, max_tokens) for model in models))


async def answer(session: aiohttp.ClientSession, url: str, model: str, max_tokens: int) -> str:
    body = {"model": model, "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    while True:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            if response.status == 200:
                text: str = (await response.json())["choices"][0]["text"]
                return text
            if response.status != 503:
                raise click.ClickException(f"{model}: {response.status} {(await response.text())[:500]}")
        await asyncio.sleep(float(response.headers["Retry-After"]))  # the next engine takes longer than a minute


async def healthy_again(session: aiohttp.ClientSession, url: str) -> float:
    """When /health answers 200 after it did not; by time.perf_counter()."""
    was_away = False
    while True:
        async with session.get(f"{url}/health") as response:
            if response.status == 200 and was_away:
                return time.perf_counter()
            was_away = was_away or response.status != 200
        await asyncio.sleep(POLL_S)


def torch_import_s() -> float:
    """CPU time of a process that does nothing else; the second one, as files are in memory then."""
    used = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return used[-1]


if __name__ == "__main__":
    main()
