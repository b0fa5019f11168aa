"""What does a batch cost the requests that run beside it?

One server. Levels of --duration seconds with Poisson arrivals at --rate, the same requests each, take turns: without a
batch, and while the rows of one run, which is cancelled behind the level. Latencies of all rounds together are
compared; the target is a p99 of whole requests of at most 1.1 times that without. Then the batch has the server for
itself for as long, so that its rows a second beside requests can be seen as a share. Prompts are random words. The
limit is printed first: no step takes less time than reading the weights, and a request that comes while a row's step
runs waits for its end.

    python -m bench.batch_beside [--rate 1] [--duration 30] [--rounds 5] [--max-tokens 64]
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from typing import Any

import aiohttp
import click

from specserve.loadgen.client import Record, Target, open_loop, open_session
from specserve.loadgen.plan import make_plan
from specserve.loadgen.report import LevelFigures, level_figures

from . import common, options
from .server_process import serving
from .tasks import BaseModel

TIMEOUT_S = 300.0
MAX_IN_FLIGHT = 2000
PROMPT_WORDS = 64
NUM_ROWS = 20_000  # more than any level answers
LATENCIES = ("end_to_end_ms", "ttft_ms", "inter_token_ms")
URL = "/v1/chat/completions"


class Rows:
    """A batch of many rows, that runs within."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str, max_tokens: int, num_started: int):
        self._session, self._url = session, f"{url}/v1"
        self._model, self._max_tokens, self._num_started = model, max_tokens, num_started
        self._id = ""
        self.num_answered = 0

    async def __aenter__(self) -> Rows:
        plan = make_plan(
            [self._model], {}, num_requests=NUM_ROWS, rate=None, duration_s=0.0, popularity="uniform",
            zipf_exponent=1.0, prompt_words=PROMPT_WORDS, seed=f"rows {self._num_started}",
        )  # fmt: skip
        fields = {"model": self._model, "max_tokens": self._max_tokens, "temperature": 0, "ignore_eos": True}
        lines = [
            json.dumps({"custom_id": str(idx), "url": URL, "body": {**fields, "messages": request.messages}})
            for idx, request in enumerate(plan)
        ]
        form = aiohttp.FormData({"purpose": "batch"})
        form.add_field("file", "\n".join(lines).encode(), filename="rows.jsonl")
        file = await self._ask("POST", "/files", data=form)
        body = {"input_file_id": file["id"], "endpoint": URL, "completion_window": "24h"}
        self._id = (await self._ask("POST", "/batches", json=body))["id"]
        while await self._count() == 0:  # it runs
            await asyncio.sleep(0.1)
        self._before = await self._count()
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.num_answered = await self._count() - self._before
        await self._ask("POST", f"/batches/{self._id}/cancel", json={})
        while (await self._ask("GET", f"/batches/{self._id}"))["status"] != "cancelled":
            await asyncio.sleep(0.1)

    async def _count(self) -> int:
        return int((await self._ask("GET", f"/batches/{self._id}"))["request_counts"]["completed"])

    async def _ask(self, method: str, path: str, **fields: Any) -> dict[str, Any]:
        async with self._session.request(method, self._url + path, **fields) as response:
            answer: dict[str, Any] = await response.json()
            if response.status != 200:
                raise click.ClickException(f"{path}: {answer}")
            return answer


@click.command(help=__doc__.partition("\n")[0])
@options.model
@click.option("--rate", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="Requests/s.")
@options.at_least(1, "--duration", 30, "Seconds of a level.")
@options.rounds(5)
@options.at_least(1, "--max-tokens", 64)
@options.at_least(1, "--row-tokens", 64, "Of a row's answer.")
@options.save("batch_beside")
def main(model: str, rate: float, duration: int, rounds: int, max_tokens: int, row_tokens: int, save: bool) -> None:
    run = common.start("batch_beside", "torch")
    base = BaseModel.load(model)
    floor = common.print_floor(base.path)
    with (
        tempfile.TemporaryDirectory(prefix="batches-") as folder,
        serving(str(base.path), "--batch-dir", folder) as server,
    ):
        figures = asyncio.run(measure(server.url, base.path.name, rate, duration, rounds, max_tokens, row_tokens))
    settings = {
        "model": base.name, "rate": rate, "duration_s": duration, "rounds": rounds, "max_tokens": max_tokens,
        "row_tokens": row_tokens, "floor_ms": round(floor.ms(), 2),
    }  # fmt: skip
    run.finish({**settings, **figures}, save)


async def measure(
    url: str, model: str, rate: float, duration_s: float, rounds: int, max_tokens: int, row_tokens: int
) -> dict[str, Any]:
    """Latencies without and beside a batch, their ratios, and the batch's rows a second."""
    fields = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    target = Target(url, True, fields, TIMEOUT_S, MAX_IN_FLIGHT)
    without: list[Record] = []
    beside: list[Record] = []
    answered = alone = num_batches = 0
    async with open_session(target) as session:

        async def level(number: int) -> list[Record]:
            plan = make_plan(
                [model], {}, num_requests=int(2 * rate * duration_s) + 8, rate=rate, duration_s=duration_s,
                popularity="uniform", zipf_exponent=1.0, prompt_words=PROMPT_WORDS, seed=f"level {number}",
            )  # fmt: skip
            return await open_loop(session, target, plan)

        await level(-1)  # libraries are warm
        for number in range(rounds):
            without += await level(number)
            async with Rows(session, url, model, row_tokens, num_batches) as rows:
                beside += await level(number)
            answered += rows.num_answered
            async with Rows(session, url, model, row_tokens, num_batches + 1) as rows:
                await asyncio.sleep(duration_s)
            alone += rows.num_answered
            num_batches += 2
            told(without, beside)
    ratios = told(without, beside)
    total_s = rounds * duration_s
    return {
        "without": summary(level_figures(without, rate, None)),
        "beside": summary(level_figures(beside, rate, None)),
        "ratios": ratios,
        "rows_per_s": {"beside": round(answered / total_s, 3), "alone": round(alone / total_s, 3)},
    }


def told(without: list[Record], beside: list[Record]) -> dict[str, dict[str, float]]:
    """Beside over without, by latency and percentile; printed."""
    figures = [summary(level_figures(records, None, None)) for records in (without, beside)]
    ratios = {
        name: {key: round(figures[1][name][key] / figures[0][name][key], 3) for key in ("p50", "p99")}
        for name in LATENCIES
        if name in figures[0] and name in figures[1]
    }
    for name, ratio in ratios.items():
        click.echo(
            f"{name}: p50 {ratio['p50']:.2f}, p99 {ratio['p99']:.2f} times that without ({len(beside)} requests)"
        )
    return ratios


def summary(figures: LevelFigures) -> dict[str, Any]:
    latencies = {name: getattr(figures, name) for name in LATENCIES}
    return {
        "num_ok": figures.num_ok,
        "errors": figures.errors,
        **{
            name: {"p50": round(found.p50, 2), "p99": round(found.p99, 2)}
            for name, found in latencies.items()
            if found is not None
        },
    }


if __name__ == "__main__":
    main()
