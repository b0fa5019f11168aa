"""What do a thousand adapters cost that take turns in room for a few, against those that always fit?

One server for each case, all up at the same time and over the same directories; each round asks every one of them for
the same number of completions, in an order that turns from round to round, after an unmeasured one. Clients ask one
after the other over HTTP, greedy, without drafts and prefix cache, so that all servers do the same work but for which
adapters it is:

    resident    so many adapters by Zipf's law, all of which fit
    zipf        --adapters of them by Zipf's law, in room for --room
    distinct    the same room, and no adapter is asked for twice before all others were: every request waits for a load

Wanted: zipf has 0.95 of the throughput of the first resident case, and twice its p99 time to first token at most.
Beside throughput stands the CPU time of server and engine, which other work on the machine changes less. The limit is
printed first: a step reads the base's weights, and those of each of its adapters.

    python -m bench.adapter_scaling [--adapters 1000] [--room 32] [--resident 8,32] [--rounds 4] [--requests 96]
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from specserve.loadgen.client import Record, Target, closed_loop, open_session
from specserve.loadgen.plan import PlannedRequest, Popularity, make_plan
from specserve.loadgen.report import distribution
from specserve.model.config import ModelConfig
from specserve.model.shapes import PARENT

from . import common, options
from .adapter_files import write_adapters
from .server_process import Serving, metrics, serving
from .tasks import BaseModel

TIMEOUT_S = 120.0
COUNTERS = ("adapter_loads", "adapter_reads", "adapter_evictions", "adapters_asked", "adapter_waits")


@dataclass(slots=True)
class Case:
    """One server, and what was measured on it."""

    name: str
    adapters: list[str]  # most popular first
    popularity: Popularity
    flags: list[str]
    server: Serving | None = None
    num_asked: int = 0
    tokens_per_s: list[float] = field(default_factory=list)  # one a round
    cpu_ms_a_token: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)  # one a request
    counts: dict[str, float] = field(default_factory=dict)

    def plan(self, num: int, words: int, seed: str) -> list[PlannedRequest]:
        first = self.num_asked % len(self.adapters) if self.popularity == "distinct" else 0
        adapters = self.adapters[first:] + self.adapters[:first]
        self.num_asked += num
        return make_plan(
            adapters, {}, num_requests=num, rate=None, duration_s=TIMEOUT_S, popularity=self.popularity,
            zipf_exponent=1.0, prompt_words=words, seed=seed,
        )  # fmt: skip


@click.command(help=__doc__.partition("\n")[0])
@options.at_least(2, "--adapters", 1000, "Registered in the cases zipf and distinct.")
@options.at_least(1, "--room", 32, "Adapters that fit there.")
@options.numbers("--resident", "8,32", "Cases in which all fit.")
@options.model
@options.rounds(4)
@options.at_least(1, "--requests", 96, "Of a round, on each server.")
@options.at_least(3, "--clients", 8, "That ask at the same time, one at least for each length of output.")
@options.at_least(8, "--tokens", 32, "Mean output of a request.")
@options.at_least(1, "--prompt-words", 32)
@options.at_least(1, "--rank", 8)
@click.option("--modules", default="q_proj,v_proj", show_default=True, help="Linears with LoRA; peft's own default.")
@options.save("adapter_scaling")
def main(
    adapters: int, room: int, resident: list[int], model: str, rounds: int, requests: int, clients: int, tokens: int,
    prompt_words: int, rank: int, modules: str, save: bool,
) -> None:  # fmt: skip
    if unknown := [name for name in modules.split(",") if name not in PARENT]:
        raise click.UsageError(f"--modules: {', '.join(unknown)} are not linears of a layer")
    run = common.start("adapter_scaling", "torch")
    base = BaseModel.load(model)
    floor = common.WeightFloor.measured(base.path)
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="adapters-")))
        start_s = time.perf_counter()
        names = write_adapters(root, ModelConfig.from_dir(base.path), adapters, rank, modules.split(","))
        num_bytes = sum(file.stat().st_size for file in (root / names[0]).iterdir())
        click.echo(f"wrote {adapters} adapters of {num_bytes / 1e6:.2f} MB in {time.perf_counter() - start_s:.1f} s")
        click.echo(
            f"limit: a step that only reads weights takes {floor.ms():.1f} ms at 16 bits, "
            f"and {1e3 * num_bytes / floor.bytes_per_s:.2f} ms for each distinct adapter"
        )
        few = ["--max-adapters", str(room)]
        cases = [Case(f"{num} resident", names[:num], "zipf", []) for num in resident]
        cases += [Case(f"{adapters} zipf", names, "zipf", few), Case(f"{adapters} distinct", names, "distinct", few)]
        flags = [str(base.path), "--adapters-dir", str(root), "--speculation", "off", "--no-prefix-caching"]
        for case in cases:
            case.server = stack.enter_context(serving(*flags, "--kv-cache-gib", "0.1", *case.flags))
        for round_idx in range(rounds + 1):
            turn = round_idx % len(cases)
            for case in [*cases[turn:], *cases[:turn]]:
                plan = case.plan(requests, prompt_words, str(round_idx))
                asyncio.run(ask(case, plan, clients, tokens, is_measured=round_idx > 0))
            rates = ", ".join(f"{case.name} {case.tokens_per_s[-1]:.1f}" for case in cases if case.tokens_per_s)
            click.echo(f"round {round_idx}, tokens/s: {rates}" if round_idx else "warmed up")
    figures = figures_of(cases)
    for name, of_case in figures.items():
        click.echo(f"{name}: {of_case}")
    settings = {
        "model": base.name, "rank": rank, "modules": modules, "adapter_mb": round(num_bytes / 1e6, 3), "room": room,
        "rounds": rounds, "requests": requests, "clients": clients, "tokens": tokens, "prompt_words": prompt_words,
    }  # fmt: skip
    run.finish({**settings, "figures": figures}, save)


async def ask(case: Case, plan: Sequence[PlannedRequest], clients: int, tokens: int, *, is_measured: bool) -> None:
    """One round on one server."""
    assert case.server is not None
    url = case.server.url
    # Outputs of three lengths: requests of one would end, and change adapters, all at once.
    targets = [
        Target(url, False, {"max_tokens": num, "temperature": 0, "ignore_eos": True}, TIMEOUT_S, clients)
        for num in (tokens * 3 // 4, tokens, tokens * 5 // 4)
    ]
    async with open_session(targets[0]) as session:
        if not is_measured and case.popularity == "zipf" and not case.flags:
            for name in case.adapters:  # resident is what was asked for once
                await closed_loop(session, targets[0], [PlannedRequest(name, plan[0].messages, None)], 1, TIMEOUT_S)
        before = await metrics(session, url)
        start_s, cpu_s = time.perf_counter(), case.server.cpu_s()
        parts = [(target, plan[idx::3], len(range(idx, clients, 3))) for idx, target in enumerate(targets)]
        loops = (closed_loop(session, target, part, num, TIMEOUT_S) for target, part, num in parts)
        records = [record for done in await asyncio.gather(*loops) for record in done]
        elapsed_s, cpu_s = time.perf_counter() - start_s, case.server.cpu_s() - cpu_s
        after = await metrics(session, url)
    check(case, records)
    if is_measured:
        num_tokens = sum(record.usage.completion_tokens for record in records if record.usage is not None)
        case.tokens_per_s.append(num_tokens / elapsed_s)
        case.cpu_ms_a_token.append(1e3 * cpu_s / num_tokens)
        case.ttft_ms += [1e3 * (record.chunks[0].at_s - record.sent_s) for record in records]
        for name in COUNTERS:
            grown = after[f"engine_num_{name}"] - before[f"engine_num_{name}"]
            case.counts[name] = case.counts.get(name, 0) + grown


def check(case: Case, records: Sequence[Record]) -> None:
    failed = next((record for record in records if record.error is not None or not record.chunks), None)
    if failed is not None:
        raise click.ClickException(f"{case.name}: a request failed: {failed.error} {failed.error_text[:500]}")


def figures_of(cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
    first, figures = cases[0], {}
    for case in cases:
        ttft, of_first = distribution(case.ttft_ms), distribution(first.ttft_ms)
        assert ttft is not None and of_first is not None
        ratios = [a / b for a, b in zip(case.tokens_per_s, first.tokens_per_s, strict=True)]
        figures[case.name] = {
            "tokens_per_s": common.spread(case.tokens_per_s),
            "ratio_to_first": common.spread(ratios),
            "cpu_ms_a_token": common.spread(case.cpu_ms_a_token),
            "ttft_ms": {"p50": ttft.p50, "p99": ttft.p99, "longest": ttft.max},
            "p99_to_first": round(ttft.p99 / of_first.p99, 3),
            **{name: int(count) for name, count in case.counts.items()},
        }
    return figures


if __name__ == "__main__":
    main()
