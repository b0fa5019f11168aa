"""Up to which rate do nine requests in ten keep to their latencies, and does speculation move it?

One server for each case, all up at the same time: the base model alone and --loras LoRAs by Zipf's law, each with
speculation and without. The largest rate is sought at which a --share of the requests is good: succeeds, and keeps to
every --goodput target in milliseconds (ttft, tpot, e2el: as `specserve bench serve`). A rate is doubled while it is
good, or halved while it is not, and then the middle of the last two is tried (in the geometric mean) until they are
closer than --precision. A level has Poisson arrivals for --duration seconds, or as long as --least requests take; cases
are asked for the same at the same rate, and take turns by levels, so that a busy moment meets all.

The LoRAs are those of --adapters-dir, and random ones of rank 8 on q and v, without heads, up to --loras. Where it is
that of the demo adapters, each is asked for its task's held-out rows, and the base model for all of them; else prompts
are random words. Greedy. The limit is printed first: without drafts no time between tokens is below a step that only
reads the weights.

    python -m bench.goodput [--goodput ttft:2000 --goodput tpot:200] [--loras 8] [--share 0.9] [--duration 30]
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from specserve.cli.bench_serve import goodput_targets
from specserve.loadgen.client import Target, closed_loop, open_loop, open_session
from specserve.loadgen.plan import Messages, PlannedRequest, make_plan
from specserve.loadgen.report import LevelFigures, level_figures
from specserve.model.config import ModelConfig
from specserve.training.data.dataset import read_rows

from . import common, options
from .adapter_files import write_adapters
from .server_process import Serving, serving
from .tasks import DEMO_TASKS, EXAMPLES, BaseModel, demo_rows

DEMO_ADAPTERS = EXAMPLES / "adapters"
TIMEOUT_S = 300.0
MAX_IN_FLIGHT = 2000
PROMPT_WORDS = 64
LEAST_RATE = 1 / 64  # requests/s


class Search:
    """The largest rate that is good, from those that were tried."""

    def __init__(self, first: float, most: float, precision: float):
        self._first, self._most, self._precision = min(first, most), most, precision
        self._good = 0.0  # the largest that is; 0: none yet
        self._bad = math.inf  # the least that is not

    @property
    def rate(self) -> float:
        """0 where none is good."""
        return self._good

    def next(self) -> float | None:
        """The rate to try; None when the answer is known as well as it shall be."""
        if not self._good and self._bad == math.inf:
            return self._first
        if not self._good:
            return self._bad / 2 if self._bad > LEAST_RATE else None
        if self._bad == math.inf:
            return min(2 * self._good, self._most) if self._good < self._most else None
        return math.sqrt(self._good * self._bad) if self._bad / self._good > self._precision else None

    def add(self, rate: float, is_good: bool) -> None:
        if is_good:
            self._good = max(self._good, rate)
        else:
            self._bad = min(self._bad, rate)


@dataclass(slots=True)
class Case:
    """One server, and what was found of it."""

    name: str
    models: list[str]  # most popular first
    prompts: Mapping[str, Sequence[Messages]]
    flags: list[str]
    search: Search
    server: Serving | None = None
    levels: list[LevelFigures] = field(default_factory=list)

    def plan(self, rate: float, duration_s: float) -> list[PlannedRequest]:
        return make_plan(
            self.models, self.prompts, num_requests=math.ceil(2 * rate * duration_s) + 1, rate=rate,
            duration_s=duration_s, popularity="zipf", zipf_exponent=1.0, prompt_words=PROMPT_WORDS, seed=f"{rate:.6g}",
        )  # fmt: skip

    def figures(self) -> dict[str, Any]:
        best = next((level for level in self.levels if level.rate_offered == self.search.rate), None)
        tried = [
            {"rate": round(level.rate_offered or 0.0, 4), "good_share": level.good_share, "goodput": level.goodput}
            for level in sorted(self.levels, key=lambda level: level.rate_offered or 0.0)
        ]
        return {
            "rate": round(self.search.rate, 4),
            "goodput": best.goodput if best is not None else 0.0,
            "output_tokens_per_s": best.output_tokens_per_s if best is not None else 0.0,
            "levels": tried,
        }


@click.command(help=__doc__.partition("\n")[0])
@options.model
@click.option(
    "--goodput", "goodput", multiple=True, metavar="NAME:MS", default=("ttft:2000", "tpot:200"), show_default=True
)
@click.option("--share", type=click.FloatRange(0, 1, min_open=True), default=0.9, show_default=True)
@click.option("--adapters-dir", type=options.ADAPTER, default=DEMO_ADAPTERS, help="Default: the demo adapters.")
@options.at_least(1, "--loras", 8)
@click.option("--first-rate", type=click.FloatRange(LEAST_RATE), default=0.5, show_default=True)
@click.option("--most-rate", type=click.FloatRange(LEAST_RATE), default=256.0, show_default=True)
@click.option(
    "--precision", type=click.FloatRange(1.01), default=1.15, show_default=True, help="Of the rate, a factor."
)
@options.at_least(1, "--duration", 30, "Seconds of a level.")
@options.at_least(1, "--least", 20, "Requests of a level.")
@options.at_least(1, "--max-tokens", 64)
@click.option("--endpoint", type=click.Choice(["chat", "completions"]), default="chat", show_default=True)
@options.save("goodput")
def main(
    model: str, goodput: Sequence[str], share: float, adapters_dir: Path, loras: int, first_rate: float,
    most_rate: float, precision: float, duration: int, least: int, max_tokens: int, endpoint: str, save: bool,
) -> None:  # fmt: skip
    targets_ms = goodput_targets(goodput)
    run = common.start("goodput", "torch")
    base = BaseModel.load(model)
    floor = common.print_floor(base.path)
    fields = {"max_tokens": max_tokens, "temperature": 0}
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="adapters-")))
        names = gather_adapters(root, adapters_dir, ModelConfig.from_dir(base.path), loras)
        prompts = demo_prompts() if adapters_dir == DEMO_ADAPTERS else {}
        all_rows = [messages for rows in prompts.values() for messages in rows]
        alone = [base.path.name], {base.path.name: all_rows} if all_rows else {}, []
        mixed = names, {name: rows for name, rows in prompts.items() if name in names}, ["--adapters-dir", str(root)]
        cases = [
            Case(
                f"{what}, {mode}",
                models,
                rows,
                [*flags, "--speculation", mode],
                Search(first_rate, most_rate, precision),
            )
            for what, (models, rows, flags) in (("base", alone), (f"{loras} LoRAs", mixed))
            for mode in ("auto", "off")
        ]
        for case in cases:
            case.server = stack.enter_context(serving(str(base.path), *case.flags))
        while asyncio.run(turn(cases, fields, endpoint, targets_ms, share, duration, least)):
            pass
    figures = {case.name: case.figures() for case in cases}
    settings = {
        "model": base.name, "targets_ms": targets_ms, "share": share, "duration_s": duration, "least": least,
        "max_tokens": max_tokens, "precision": precision, "floor_ms": round(floor.ms(), 2),
    }  # fmt: skip
    run.finish({**settings, "figures": figures, "on_over_off": on_over_off(figures)}, save)


def gather_adapters(root: Path, adapters_dir: Path, config: ModelConfig, num: int) -> list[str]:
    """At most `num` of the folder's, and random ones up to that, in `root`; their names."""
    names = sorted(path.parent.name for path in adapters_dir.glob("*/adapter_config.json"))[:num]
    for name in names:
        shutil.copytree(adapters_dir / name, root / name)
    return names + write_adapters(root, config, num - len(names), 8, ["q_proj", "v_proj"])


def demo_prompts() -> dict[str, list[Messages]]:
    return {task: [row.messages[:-1] for row in read_rows(demo_rows(task))] for task in DEMO_TASKS}


async def turn(
    cases: Sequence[Case], fields: dict[str, Any], endpoint: str, targets_ms: Mapping[str, float], share: float,
    duration_s: float, least: int,
) -> bool:  # fmt: skip
    """One level of each case that is not done; whether there was any."""
    is_any = False
    for case in cases:
        rate = case.search.next()
        if rate is None:
            continue
        is_any = True
        assert case.server is not None
        target = Target(case.server.url, endpoint == "chat", fields, TIMEOUT_S, MAX_IN_FLIGHT)
        async with open_session(target) as session:
            if not case.levels:  # adapters are loaded, libraries are warm
                warmup = [PlannedRequest(name, case.plan(1.0, 10.0)[0].messages, None) for name in case.models]
                await closed_loop(session, target, warmup, 1, TIMEOUT_S)
            records = await open_loop(session, target, case.plan(rate, max(duration_s, least / rate)))
        level = level_figures(records, rate, None, targets_ms)
        case.levels.append(level)
        case.search.add(rate, (level.good_share or 0.0) >= share)
        click.echo(
            f"{case.name}: at {rate:.3g} requests/s {100 * (level.good_share or 0.0):.0f}% of {level.num_requests} "
            f"are good{''.join(f', {num} {kind}' for kind, num in level.errors.items())}"
        )
    return is_any


def on_over_off(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The largest good rate with speculation over that without, by what is asked."""
    ratios: dict[str, float | None] = {}
    for name, of_case in figures.items():
        what, _, speculation = name.rpartition(", ")
        if speculation == "auto":
            without = figures[f"{what}, off"]["rate"]
            ratios[what] = round(of_case["rate"] / without, 3) if without else None
    return ratios


if __name__ == "__main__":
    main()
