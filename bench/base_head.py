"""What is a head of the bare base worth to requests without adapter, beside what repeated text alone drafts?

Two engines in one process, one with the head and one without; each round answers the same prompts without drafts, with
repeated text, and with the head, in an order that turns. Small models' answers loop, and loops are drafted perfectly:
so tokens a verification are given for the answers that end, too.

    python -m bench.base_head examples/base_head --data examples/data/base_chat.dev.jsonl [--rows 24]
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import click

from specserve.training.evaluation.answers import Answer, Answers, Served, answer, make_engine

from . import common, options
from .tasks import BaseModel

WAYS = ("off", "repeated text", "head")
_MAX_LEN = 2048


@click.command(help=__doc__.partition("\n")[0])
@click.argument("head", type=options.ADAPTER)
@options.file("--data", "Rows whose prompts are answered.")
@options.model
@options.rounds(3)
@options.at_least(1, "--rows", 24)
@options.numbers("--batch", "1,8")
@options.at_least(1, "--max-tokens", 200)
@click.option("--temperature", "temperatures", multiple=True, type=click.FloatRange(0, 2), default=(0.0, 0.7, 1.0))
@options.save("base_head")
def main(
    head: Path, data: Path, model: str, rounds: int, rows: int, batch: list[int], max_tokens: int,
    temperatures: tuple[float, ...], save: bool,
) -> None:  # fmt: skip
    run = common.start("base_head", "torch")
    base = BaseModel.load(model)
    common.print_floor(base.path)
    prompts = base.prompts(data, rows)
    with_head = Served.of(base.path, head, batch=max(batch), max_len=_MAX_LEN).engine
    without = make_engine(base.path, batch=max(batch), max_len=_MAX_LEN)
    if with_head.info.base_head is None or with_head.info.base_head.error:
        raise click.UsageError(f"{head} does not draft: {with_head.info.base_head}")
    ways = {"off": (without, "off"), "repeated text": (without, "auto"), "head": (with_head, "auto")}
    figures = {}
    for size in batch:
        for temperature in temperatures:
            found: dict[str, list[Answers]] = {way: [] for way in WAYS}
            for idx in range(rounds):
                for way in WAYS[idx % 3 :] + WAYS[: idx % 3]:
                    engine, mode = ways[way]
                    found[way].append(
                        answer(engine, None, prompts, max_tokens, mode=mode, batch=size, temperature=temperature)
                    )
            name = f"batch {size}, temperature {temperature:g}"
            figures[name] = figures_of(found)
            click.echo(f"{name}: {figures[name]}")
    settings = {"rounds": rounds, "rows": len(prompts), "max_tokens": max_tokens}
    run.finish({"model": base.name, "dtype": without.info.dtype, **settings, "figures": figures}, save)


def figures_of(found: dict[str, list[Answers]]) -> dict[str, Any]:
    """A value of each way a round; tokens are the same in all of them."""
    tokens = [[one.tokens for one in answers.answers] for rounds in found.values() for answers in rounds]
    return {
        "answers_that_end": sum(_ends(one) for one in found["off"][0].answers),
        "answers_equal": all(each == tokens[0] for each in tokens),
        **{way: _way(found["off"], found[way]) for way in WAYS[1:]},
    }


def _way(off: list[Answers], on: list[Answers]) -> dict[str, Any]:
    ratios = [a.seconds / b.seconds for a, b in zip(off, on, strict=True)]
    lens = [num for one in on[0].answers if _ends(one) for num in one.step_lens]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
        "mean_accepted_length": round(on[0].mean_accepted_length, 3),
        "mean_accepted_length_that_end": round(sum(lens) / max(1, len(lens)), 3),
        "accepted_by_source": dict(on[0].accepted_by_source),
    }


def _ends(one: Answer) -> bool:
    return one.finish_reason == "stop"


if __name__ == "__main__":
    main()
