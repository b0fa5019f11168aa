"""Is the adaptive draft budget ever slower than no drafts, or than any fixed draft length, at any load?

One engine, one process, the demo adapters over their own held-out prompts, mixed. At each concurrency every way answers
the same prompts: off, fixed draft lengths (verified whether or not they pay) and auto; the order of ways turns from
round to round. Ratios are within a round; medians over rounds count. Greedy, EOS honoured, prompts included. The floor
is printed first: the milliseconds of a step that only reads the weights.

    python -m bench.load_sweep [--concurrency 1,2,4,8,16,32,64] [--ways off,1,2,4,8,auto] [--rounds 5] [--rows 16]
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import click

from specserve.training.evaluation.answers import Answers, answer_mixed, make_engine

from . import common, options
from .tasks import DEMO_TASKS, BaseModel, demo_adapter, demo_rows, in_turn

PLOT = common.ROOT / "docs" / "load_sweep.png"
Runs = dict[tuple[int, str], list[Answers]]  # by concurrency and way, one a round


@click.command(help=__doc__.partition("\n")[0])
@options.model
@options.numbers("--concurrency", "1,2,4,8,16,32,64")
@click.option("--ways", default="off,1,2,4,8,auto", show_default=True, help="off, auto, or a fixed draft length.")
@options.rounds(5)
@options.at_least(1, "--rows", 16, "Least prompts of each adapter.")
@options.at_least(1, "--max-tokens", 200)
@click.option("--plot", type=click.Path(path_type=Path), default=PLOT, help="Drawn if the result is saved.")
@options.save("load_sweep")
def main(
    model: str, concurrency: list[int], ways: str, rounds: int, rows: int, max_tokens: int, plot: Path, save: bool
) -> None:
    names = ways.split(",")
    if bad := [name for name in names if name not in ("off", "auto") and not name.isdecimal()]:
        raise click.UsageError(f"--ways has {bad[0]!r}; a way is off, auto or a draft length such as 4")
    run = common.start("load_sweep", "torch")
    base = BaseModel.load(model)
    floor = common.print_floor(base.path)
    engine = make_engine(base.path, batch=max(concurrency), max_len=1024)
    hashes = [engine.load_adapter(task, demo_adapter(task)).content_hash for task in DEMO_TASKS]
    prompts = [base.prompts(demo_rows(task)) for task in DEMO_TASKS]
    num_requests = len(DEMO_TASKS) * max(rows, -(-max(concurrency) // len(DEMO_TASKS)))
    requests = [(hashes[task], prompt) for task, prompt in itertools.islice(in_turn(prompts), num_requests)]
    runs: Runs = {(size, way): [] for size in concurrency for way in names}
    answer_mixed(engine, requests[:6], max_tokens, batch=6)  # libraries and stacks are warm, levels are known
    for round_idx in range(rounds):
        order = names[round_idx % len(names) :] + names[: round_idx % len(names)]
        for size in concurrency:
            asked = requests[: max(size, rows * len(DEMO_TASKS))]
            for way in order:
                mode, length = (way, 16) if way in ("off", "auto") else ("fixed", int(way))
                made = answer_mixed(engine, asked, max_tokens, mode=mode, batch=size, max_draft_tokens=length)
                runs[size, way].append(made)
            rates = {way: round(runs[size, way][-1].num_tokens / runs[size, way][-1].seconds, 1) for way in order}
            click.echo(f"round {round_idx + 1}, {size} at a time, tokens/s: {rates}")
    figures = {str(size): _figures(runs, size, names) for size in concurrency}
    for name, of_size in figures.items():
        click.echo(f"{name} at a time: {of_size}")
    settings = {"rounds": rounds, "rows": rows, "max_tokens": max_tokens, "floor_ms": round(floor.ms(), 1)}
    run.finish({"model": base.name, "dtype": engine.info.dtype, **settings, "figures": figures}, save)
    if save:
        draw(plot, figures)


def _figures(runs: Runs, size: int, ways: list[str]) -> dict[str, Any]:
    """By way: tokens/s, tokens a verification, and the ratio of `auto` to it.

    Prompts are included. Steps that only decode would be another choice of steps in each way: the more is drafted, the
    more of them fall at the end, when few sequences are left.
    """
    figures: dict[str, Any] = {}
    for way in ways:
        rounds = runs[size, way]
        figures[way] = {
            "tokens_per_s": round(statistics.median(made.num_tokens / made.seconds for made in rounds), 1),
            "mean_accepted_length": round(statistics.median(made.mean_accepted_length for made in rounds), 2),
            "drafted": statistics.median(sum(answer.drafted for answer in made.answers) for made in rounds),
        }
        if "auto" in ways and way != "auto":
            pairs = list(zip(runs[size, "auto"], rounds, strict=True))
            ratios = [a.num_tokens / a.seconds * b.seconds / b.num_tokens for a, b in pairs]
            figures[way]["auto_ratio"] = common.spread(ratios)
    return figures


def draw(path: Path, figures: dict[str, Any]) -> None:
    """Tokens a second against concurrency, and the same as a share of what `auto` makes in the same round."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    rate, ratio = figure.subplots(1, 2)
    sizes = list(figures)
    for way in figures[sizes[0]]:
        label = f"fixed {way}" if way.isdecimal() else way
        style = {"linewidth": 2.5, "color": "black"} if way == "auto" else {"linestyle": "--" if way == "off" else "-"}
        rate.plot(sizes, [figures[size][way]["tokens_per_s"] for size in sizes], label=label, **style)
        if "auto_ratio" in figures[sizes[0]][way]:
            shares = [1 / figures[size][way]["auto_ratio"]["median"] for size in sizes]
            ratio.plot(sizes, shares, label=label, **style)
    ratio.axhline(1.0, color="black", linewidth=2.5, label="auto")
    rate.set(xlabel="requests at a time", ylabel="tokens/s, prompts included", ylim=(0, None))
    ratio.set(xlabel="requests at a time", ylabel="tokens/s, share of auto's", ylim=(0, None))
    rate.legend()
    ratio.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
