"""`specserve bench serve`: flags to a plan of load; drawing, sending and summing up are in `specserve.loadgen`.

Bounded by construction: at most MAX_REQUESTS requests a level, no arrival after --duration, no answer waited for longer
than --timeout. Knows nothing of the engine: any OpenAI-compatible server can be measured.
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
import msgspec

from .. import __version__
from ..errors import UserError
from ..loadgen.plan import POPULARITIES
from .options import debug_option

if TYPE_CHECKING:
    from ..loadgen.client import Target
    from ..loadgen.plan import Messages
    from ..loadgen.report import LevelFigures

MAX_REQUESTS = 100_000
DEFAULT_REQUESTS = 100
MAX_LEVELS = 32


class BenchResult(msgspec.Struct, frozen=True):
    """What --output holds: what was asked for, and the figures of each level."""

    bench: str
    version: str
    endpoint: str
    models: list[str]
    popularity: str
    zipf_exponent: float
    data: list[str]  # file names, or the built-in prompts in words
    fields: dict[str, Any]  # of every request
    num_requests: int
    duration_s: float
    warmup: int
    timeout_s: float
    seed: int
    levels: list["LevelFigures"]
    targets_ms: dict[str, float] = {}  # of goodput


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server, with or without /v1.")
@click.option("--rate", metavar="X,X", help="Open loop: Poisson arrivals of so many requests a second, one level each.")
@click.option("--concurrency", metavar="N,N", help="Closed loop: so many requests at the same time, one level each.")
@click.option(
    "--num-requests",
    type=click.IntRange(1, MAX_REQUESTS),
    help=f"Requests of a level, at most.  [default: {DEFAULT_REQUESTS}; with --duration {MAX_REQUESTS}]",
)
@click.option(
    "--duration",
    type=click.FloatRange(0, 86400, min_open=True),
    metavar="S",
    help="No request starts later in its level than this.  [default: 600]",
)
@click.option("--adapters", metavar="A,B", help="Models to ask for, most popular first.  [default: all of /v1/models]")
@click.option("--popularity", type=click.Choice(POPULARITIES), default="uniform", show_default=True)
@click.option("--zipf-exponent", type=click.FloatRange(0, 10), default=1.0, show_default=True)
@click.option(
    "--data",
    multiple=True,
    metavar="[ADAPTER=]FILE",
    help="JSONL of prompts as for training, for all adapters or for one; may be repeated.  [default: random words]",
)
@click.option("--prompt-words", type=click.IntRange(1, 100_000), default=64, show_default=True, help="Without --data.")
@click.option("--endpoint", type=click.Choice(("chat", "completions")), default="chat", show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True, help="Output of a request.")
@click.option("--ignore-eos", is_flag=True, help="Always --max-tokens of output; not every server knows it.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--token-counts", is_flag=True, help="Ask for log-probabilities, to count each chunk's tokens exactly.")
@click.option(
    "--warmup", type=click.IntRange(0, 10_000), default=0, show_default=True, help="Unmeasured requests before."
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, 3600, min_open=True),
    default=120.0,
    show_default=True,
    metavar="S",
    help="How long an answer may take.",
)
@click.option(
    "--max-in-flight", type=click.IntRange(1, 50_000), default=1000, show_default=True, help="More are not sent."
)
@click.option(
    "--goodput",
    multiple=True,
    metavar="NAME:MS",
    help="Count the requests that keep to a latency, as in --goodput ttft:500 --goodput tpot:50; also e2el, all of it.",
)
@click.option("--api-key", envvar="SPECSERVE_API_KEY", help="Sent as bearer token; also SPECSERVE_API_KEY.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True)
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write JSON.")
@click.option("--plot", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Write PNG plots.")
@debug_option
def serve(url: str, output: Path | None, plot: Path | None, **params: Any) -> int:
    """Put load on an OpenAI-compatible server and measure its latency and throughput.

    With --rate, latencies count from the moment at which a request was due. Exit code 1 if no request succeeded.
    """
    rates = _levels("--rate", params["rate"], 10_000)
    concurrencies = _levels("--concurrency", params["concurrency"], 10_000, whole=True)
    if bool(rates) == bool(concurrencies):
        raise click.UsageError("give either --rate, as in --rate 1,2,4, or --concurrency, as in --concurrency 1,8")
    if output is not None and not output.parent.is_dir():
        raise click.UsageError(f"--output {output}: there is no directory {output.parent}")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise click.UsageError(f"--url {url!r} is not of the form http://host:port")
    from ..loadgen.client import Target

    fields: dict[str, Any] = {
        "max_tokens": params["max_tokens"],
        "temperature": params["temperature"],
        "seed": params["seed"],
    }
    is_chat = params["endpoint"] == "chat"
    if params["ignore_eos"]:
        fields["ignore_eos"] = True
    if params["token_counts"]:
        fields["logprobs"] = True if is_chat else 0
    target = Target(
        url=url.rstrip("/").removesuffix("/v1"), is_chat=is_chat, fields=fields, timeout_s=params["timeout"],
        max_in_flight=params["max_in_flight"], api_key=params["api_key"],
    )  # fmt: skip
    duration_s = params["duration"] or 600.0
    num_requests = params["num_requests"] or (MAX_REQUESTS if params["duration"] else DEFAULT_REQUESTS)
    params |= {"duration": duration_s, "num_requests": num_requests, "targets_ms": goodput_targets(params["goodput"])}
    result = asyncio.run(_measure(target, rates, concurrencies, params))
    if output is not None:
        output.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    if plot is not None:
        from ..loadgen.plots import write_plots

        click.echo("plots: " + ", ".join(map(str, write_plots(result.levels, plot))))
    return 0 if any(level.num_ok for level in result.levels) else 1


async def _measure(
    target: "Target", rates: list[float], concurrencies: list[float], params: Mapping[str, Any]
) -> BenchResult:
    from ..loadgen import client, report
    from ..loadgen.plan import PlannedRequest, make_plan

    levels: list[LevelFigures] = []
    async with client.open_session(target) as session:
        listed = await client.list_models(session, target)
        names = (params["adapters"] or "").split(",") if params["adapters"] else [model.id for model in listed]
        names = [name.strip() for name in names if name.strip()]
        if not names:
            raise UserError("there is no model to ask for; name some with --adapters")
        if any(model.owned_by == "specserve" for model in listed):  # others may refuse a field they do not know
            target.fields["return_speculation_stats"] = True
        prompts = _read_prompts(params["data"], names)

        def plan(seed: str, num_requests: int, rate: float | None, popularity: str) -> list[PlannedRequest]:
            return make_plan(
                names, prompts, num_requests=num_requests, rate=rate, duration_s=params["duration"],
                popularity=popularity, zipf_exponent=params["zipf_exponent"],  # type: ignore[arg-type]
                prompt_words=params["prompt_words"], seed=seed,
            )  # fmt: skip

        if params["warmup"]:
            warmup = plan(f"{params['seed']}/warmup", params["warmup"], None, "distinct")
            await client.closed_loop(session, target, warmup, 1, params["duration"])
        for idx, load in enumerate(rates or concurrencies):
            rate = load if rates else None
            requests = plan(f"{params['seed']}/{idx}", params["num_requests"], rate, params["popularity"])
            due = f"the last due after {requests[-1].arrival_s:.0f} s" if rate and requests else "as others end"
            click.echo(f"{_name(rate, load)}: at most {len(requests)} requests, {due}", err=True)
            if rate is not None:
                records = await client.open_loop(session, target, requests)
            else:
                records = await client.closed_loop(session, target, requests, int(load), params["duration"])
            if not records:
                raise UserError(f"no request was due within --duration {params['duration']:g} s at --rate {rate:g}")
            levels.append(report.level_figures(records, rate, None if rates else int(load), params["targets_ms"]))
    _print(levels)
    return BenchResult(
        bench="serve",
        version=__version__,
        endpoint=params["endpoint"],
        models=names,
        popularity=params["popularity"],
        zipf_exponent=params["zipf_exponent"],
        data=[_file_name(value) for value in params["data"]] or [f"{params['prompt_words']} random words"],
        fields=target.fields,
        num_requests=params["num_requests"],
        duration_s=params["duration"],
        warmup=params["warmup"],
        timeout_s=target.timeout_s,
        seed=params["seed"],
        levels=levels,
        targets_ms=params["targets_ms"],
    )


def _print(levels: "Sequence[LevelFigures]") -> None:
    from ..loadgen import report

    click.echo("milliseconds; 'token' is each token's share of its gap, 'chunk' the gap between two arrivals")
    click.echo(report.table(levels))
    for level in levels:
        load = _name(level.rate_offered, level.concurrency)
        for kind, count in level.errors.items():
            example = " ".join(level.error_examples[kind].split())
            click.echo(f"{load}: {count} failed with {kind}, for example: {example}")
        if lines := report.adapter_table(level):
            click.echo(f"{load}:\n{lines}")
        if level.num_without_usage:
            click.echo(f"{load}: {level.num_without_usage} answers had no usage; their tokens are counted by chunks")
        if level.send_lag_ms is not None and level.send_lag_ms.p99 > 50:
            click.echo(
                f"{load}: requests were sent up to {level.send_lag_ms.max:.0f} ms after they were due; this machine "
                "is too busy to put the load"
            )


def _name(rate: float | None, concurrency: float | None) -> str:
    return f"rate {rate:g}" if rate is not None else f"parallel {concurrency:g}"


def _levels(option: str, text: str | None, limit: int, whole: bool = False) -> list[float]:
    """'1,2,4' as numbers; empty when the option is not given."""
    if text is None:
        return []
    try:
        values = [float(int(part) if whole else float(part)) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or len(values) > MAX_LEVELS or not all(0 < value <= limit for value in values):
        kind = "whole numbers" if whole else "numbers"
        raise click.UsageError(f"{option} {text!r} is not a list of at most {MAX_LEVELS} {kind} above 0, to {limit}")
    return values


def goodput_targets(values: Sequence[str]) -> dict[str, float]:
    """'ttft:500' and the like as milliseconds by name."""
    from ..loadgen.report import GOODPUT_KEYS

    targets = {}
    for value in values:
        name, _, text = value.partition(":")
        try:
            targets[name] = float(text)
        except ValueError:
            targets[name] = math.nan
        if name not in GOODPUT_KEYS or not 0 < targets[name] < math.inf:
            known = ", ".join(GOODPUT_KEYS)
            raise click.UsageError(f"--goodput {value!r} is not NAME:MS, milliseconds above 0 for one of {known}")
    return targets


def _file_name(value: str) -> str:
    name, separator, file = value.partition("=")
    return f"{name}={Path(file).name}" if separator and not Path(value).exists() else Path(value).name


def _read_prompts(data: Sequence[str], models: Sequence[str]) -> "dict[str, list[Messages]]":
    """The prompts of each model: its own files', else the shared files'; empty without files."""
    if not data:
        return {}
    from ..training.data.dataset import read_rows

    shared: list[Messages] = []
    own: dict[str, list[Messages]] = {}
    for value in data:
        name, separator, file = value.partition("=")
        is_shared = not separator or Path(value).exists()
        rows = [row.messages[:-1] for row in read_rows(value if is_shared else file)]
        if is_shared:
            shared += rows
        elif name in models:
            own.setdefault(name, []).extend(rows)
        else:
            raise UserError(f"--data {value}: {name!r} is not among the models {', '.join(models[:20])}")
    missing = [model for model in models if model not in own]
    if missing and not shared:
        raise UserError(
            f"there are no prompts for {', '.join(missing[:20])}; give --data {missing[0]}=FILE, or --data FILE for all"
        )
    return {model: own.get(model, shared) for model in models}
