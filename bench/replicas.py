"""How much more do two replicas of one thread each serve than one, and what does Ray cost a single one?

The same requests over HTTP to `specserve serve` with one thread, to two such servers that know nothing of each other,
to `specserve ray` with one replica of one thread, and with two. All are up at the same time and asked in turns, each
for a round: only who is asked has work. First what two threads read and multiply beside one. Two servers show what that
leaves to two engines. The demo adapters over their own held-out prompts, mixed; or with --shape a published size with
random weights and LoRAs, whose steps cost more than messages do. As many callers as two replicas have seats, so that
one replica is full with as many waiting. Ratios are within a round; their median counts. Beside them: the cores that
each way took in its rounds, by whose they were.

    python -m bench.replicas [--model DIR] [--rounds 5] [--seats 8] [--requests 48]
    python -m bench.replicas --shape 1b --prompt-tokens 1024 [--rounds 5] [--seats 8] [--requests 32]
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import click

from . import common, options
from .cpu_cases import SHAPES
from .cpu_limits import CpuLimits
from .process_times import cpu_seconds, taken
from .random_service import random_prompts, write_service
from .server_process import Serving, serving
from .tasks import DEMO_TASKS, BaseModel, demo_rows, in_turn

ALONE, TWICE, ONE, TWO = "serve", "serve, twice", "ray, 1 replica", "ray, 2 replicas"
WAYS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    ALONE: (("serve", ()),),
    TWICE: (("serve", ()), ("serve", ())),
    ONE: (("ray", ("--num-replicas", "1")),),
    TWO: (("ray", ("--num-replicas", "2")),),
}
RATIOS = {"twice_over_once": (TWICE, ALONE), "two_over_one": (TWO, ONE), "ray_over_serve": (ONE, ALONE)}
RANDOM_ADAPTERS, RANK = 8, 16
IDLE = "ways not asked"
READ_BYTES, LIMIT_ROUNDS = 1 << 29, 9


@dataclass(frozen=True, slots=True)
class Service:
    """What is served, and what it is asked."""

    name: str
    model_dir: str
    flags: tuple[str, ...]
    bodies: list[dict[str, Any]]


@contextmanager
def demo_service(model: str, requests: int, max_tokens: int) -> Iterator[Service]:
    base = BaseModel.load(model)
    prompts = in_turn([base.prompts(demo_rows(task)) for task in DEMO_TASKS])
    asked = [(DEMO_TASKS[task], prompt) for task, prompt in itertools.islice(prompts, requests)]
    flags = ("--adapters-dir", str(common.ROOT / "examples" / "adapters"))
    yield Service(base.name, str(base.path), flags, [_body(name, prompt, max_tokens) for name, prompt in asked])


@contextmanager
def random_service(shape: str, prompt_tokens: int, requests: int, max_tokens: int) -> Iterator[Service]:
    """As a service of structured output has them: long prompts, short answers."""
    with tempfile.TemporaryDirectory(prefix="specserve-") as folder:
        write_service(SHAPES[shape], Path(folder), RANDOM_ADAPTERS, RANK)
        prompts = random_prompts(SHAPES[shape], requests, prompt_tokens, seed=0)
        flags = ("--adapters-dir", f"{folder}/adapters", "--speculation", "off", "--no-prefix-caching")
        bodies = [_body(f"random-{idx % RANDOM_ADAPTERS}", prompt, max_tokens) for idx, prompt in enumerate(prompts)]
        yield Service(f"{shape}, random weights", f"{folder}/model", flags, bodies)


def _body(name: str, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {"model": name, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


@click.command(help=__doc__.partition("\n")[0])
@options.model
@click.option("--shape", type=click.Choice(list(SHAPES)), help="Random weights of this size in place of a model.")
@options.at_least(16, "--prompt-tokens", 1024, "Of each prompt, with --shape.")
@options.rounds(5)
@options.at_least(1, "--seats", 8, "Sequences that run in each replica.")
@options.at_least(1, "--requests", 48, "Of each way in a round.")
@options.at_least(1, "--max-tokens", 64)
@options.save("replicas")
def main(
    model: str, shape: str | None, prompt_tokens: int, rounds: int, seats: int, requests: int, max_tokens: int,
    save: bool,
) -> None:  # fmt: skip
    run = common.start("replicas", "torch", "ray", "aiohttp")
    reads, multiplies = _more_of_two_threads()
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    cores: dict[str, Counter[str]] = defaultdict(Counter)
    with ExitStack() as stack:
        made = (
            demo_service(model, requests, max_tokens)
            if shape is None
            else random_service(shape, prompt_tokens, requests, max_tokens)
        )
        service = stack.enter_context(made)
        flags = (*service.flags, "--num-threads", "1", "--max-num-seqs", str(seats), "--kv-cache-gib", "0.5",
                 "--log-level", "warning")  # fmt: skip
        servers = {
            way: [
                stack.enter_context(serving(service.model_dir, *flags, *more, program=program))
                for program, more in each
            ]
            for way, each in WAYS.items()
        }
        for way in WAYS:
            asyncio.run(_ask(servers[way], service.bodies[: 2 * seats], 2 * seats))  # adapters are read, levels known
        for idx in range(rounds):
            names = list(WAYS)
            for way in names[idx % len(names) :] + names[: idx % len(names)]:
                before, start = _cpu_seconds(servers, way), time.perf_counter()
                rates[way].append(asyncio.run(_ask(servers[way], service.bodies, 2 * seats)))
                lasted = time.perf_counter() - start
                for role, seconds in taken(before, _cpu_seconds(servers, way)).items():
                    cores[way][role] += seconds / lasted / rounds
            click.echo(f"round {idx + 1}: " + ", ".join(f"{way} {rates[way][-1]:.0f} tokens/s" for way in WAYS))
    for way in WAYS:
        click.echo(f"cores, {way}: " + ", ".join(f"{role} {num:.2f}" for role, num in cores[way].items()))
    ratios = {
        name: statistics.median(a / b for a, b in zip(rates[more], rates[less], strict=True))
        for name, (more, less) in RATIOS.items()
    }
    click.echo(
        f"two servers over one {ratios['twice_over_once']:.2f}; two replicas over one "
        f"{ratios['two_over_one']:.2f}; one over no Ray {ratios['ray_over_serve']:.2f}"
    )
    settings = {"model": service.name, "rounds": rounds, "seats": seats, "requests": requests, "max_tokens": max_tokens}
    if shape is not None:
        settings["prompt_tokens"] = prompt_tokens
    fields = {
        "tokens_per_s": {way: common.spread(found) for way, found in rates.items()},
        "cores": {way: {role: round(num, 3) for role, num in found.items()} for way, found in cores.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "two_threads_over_one": {"read": round(reads, 3), "multiply": round(multiplies, 3)},
    }
    run.finish({**settings, **fields}, save)


def _more_of_two_threads() -> tuple[float, float]:
    """What two threads read, and multiply, over what one does: no second replica adds more."""
    one, two = limits = [CpuLimits(num, READ_BYTES) for num in (1, 2)]
    for _ in range(LIMIT_ROUNDS):
        for limit in limits:
            limit.measure()
    reads, multiplies = two.bytes_per_s / one.bytes_per_s, two.peak()[1] / one.peak()[1]
    click.echo(
        f"limit: one thread reads {one.bytes_per_s / 1e9:.0f} GB/s, two {reads:.2f} times as much, and multiply "
        f"{multiplies:.2f} times: so much more can a second replica decode, and take prompts"
    )
    return reads, multiplies


def _cpu_seconds(servers: dict[str, list[Serving]], asked: str) -> dict[str, float]:
    """So far: of the way that is asked by what its processes are, of the callers, and of all other ways."""
    times = Counter({"callers": time.process_time()})
    for way, each in servers.items():
        for role, seconds in (part for server in each for part in cpu_seconds(server.pid).items()):
            times[role if way == asked else IDLE] += seconds
    return dict(times)


async def _ask(servers: Sequence[Serving], bodies: list[dict[str, Any]], callers: int) -> float:
    """Completion tokens a second of all of them; callers are shared out over `servers`."""
    left, tokens = iter(bodies), 0
    timeout = aiohttp.ClientTimeout(total=3600)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def call(url: str) -> None:
            nonlocal tokens
            for body in left:
                async with session.post(f"{url}/v1/completions", json=body) as response:
                    answer = await response.json()
                    if response.status != 200:
                        raise click.ClickException(answer["error"]["message"])
                    tokens += answer["usage"]["completion_tokens"]

        start = time.perf_counter()
        await asyncio.gather(*(call(servers[idx % len(servers)].url) for idx in range(callers)))
        return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
