"""How much more do two replicas of one thread each serve than one, and what does Ray cost a single one?

The same requests over HTTP to `specserve serve` with one thread, `specserve ray` with one replica of one thread, and
with two, which are all up at the same time and asked in turns, each for a round: only who is asked has work. The demo
adapters over their own held-out prompts, mixed, as many callers as two replicas have seats, so that one replica is full
with as many waiting. Ratios are within a round; their median counts. On a machine of two cores, two replicas have none
beside them for the server, Ray and the callers; the limit is printed first.

    python -m bench.replicas [--model DIR] [--rounds 5] [--seats 8] [--requests 48]
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from contextlib import ExitStack
from typing import Any

import aiohttp
import click

from . import common, options
from .server_process import Serving, serving
from .tasks import DEMO_TASKS, BaseModel, demo_rows, in_turn

WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "serve": ("serve", ()),
    "ray, 1 replica": ("ray", ("--num-replicas", "1")),
    "ray, 2 replicas": ("ray", ("--num-replicas", "2")),
}


@click.command(help=__doc__.partition("\n")[0])
@options.model
@options.rounds(5)
@options.at_least(1, "--seats", 8, "Sequences that run in each replica.")
@options.at_least(1, "--requests", 48, "Of each way in a round.")
@options.at_least(1, "--max-tokens", 64)
@options.save("replicas")
def main(model: str, rounds: int, seats: int, requests: int, max_tokens: int, save: bool) -> None:
    run = common.start("replicas", "torch", "ray", "aiohttp")
    cores = common.num_cores()
    click.echo(f"limit: {min(2, cores)} x of one replica, of {cores} cores; servers, Ray and callers run beside")
    base = BaseModel.load(model)
    prompts = [base.prompts(demo_rows(task)) for task in DEMO_TASKS]
    bodies = [
        {
            "model": DEMO_TASKS[task], "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True,
        }
        for task, prompt in itertools.islice(in_turn(prompts), requests)
    ]  # fmt: skip
    flags = ("--adapters-dir", str(common.ROOT / "examples" / "adapters"), "--num-threads", "1",
             "--max-num-seqs", str(seats), "--kv-cache-gib", "0.5", "--log-level", "warning")  # fmt: skip
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        servers = {
            way: stack.enter_context(serving(str(base.path), *flags, *more, program=program))
            for way, (program, more) in WAYS.items()
        }
        for server in servers.values():
            asyncio.run(_ask(server, bodies[:seats], seats))  # adapters are read, levels known
        for idx in range(rounds):
            names = list(WAYS)
            for way in names[idx % len(names) :] + names[: idx % len(names)]:
                rates[way].append(asyncio.run(_ask(servers[way], bodies, 2 * seats)))
            click.echo(f"round {idx + 1}: " + ", ".join(f"{way} {rates[way][-1]:.0f} tokens/s" for way in WAYS))
    figures: dict[str, Any] = {way: common.spread(found) for way, found in rates.items()}
    one, two, plain = rates["ray, 1 replica"], rates["ray, 2 replicas"], rates["serve"]
    ratios = {
        "two_over_one": statistics.median(b / a for a, b in zip(one, two, strict=True)),
        "ray_over_serve": statistics.median(b / a for a, b in zip(plain, one, strict=True)),
    }
    click.echo(f"two replicas over one: {ratios['two_over_one']:.2f}; one over no Ray: {ratios['ray_over_serve']:.2f}")
    settings = {"rounds": rounds, "seats": seats, "requests": requests, "max_tokens": max_tokens}
    run.finish({**settings, "tokens_per_s": figures, "ratios": {k: round(v, 3) for k, v in ratios.items()}}, save)


async def _ask(server: Serving, bodies: list[dict[str, Any]], callers: int) -> float:
    """Completion tokens a second of all of them."""
    left, tokens = iter(bodies), 0
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def call() -> None:
            nonlocal tokens
            for body in left:
                async with session.post(f"{server.url}/v1/completions", json=body) as response:
                    answer = await response.json()
                    if response.status != 200:
                        raise click.ClickException(answer["error"]["message"])
                    tokens += answer["usage"]["completion_tokens"]

        start = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(callers)))
        return tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
