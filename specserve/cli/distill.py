"""`specserve distill`: flags to a plan; the work is in `specserve.curation.distillation`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UserError
from ..teachers.spec import DEFAULT_MODEL, model_of
from .options import debug_option
from .teacher_options import TEACHER_HELP, budget_of, teacher_options, teachers_of

if TYPE_CHECKING:
    from ..curation.distillation.plan import DistillPlan

_PLAIN = (
    "data",
    "out",
    "samples",
    "temperature",
    "top_p",
    "max_tokens",
    "seed",
    "best_by",
    "min_score",
    "max_rows",
    "held_out",
)


@click.command(epilog=TEACHER_HELP)
@teacher_options(many=True)
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSONL of prompts, in the trainer's formats; answers are references and may be missing.",
)
@click.option(
    "--output",
    "out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where the rows go; rows.summary.json is written beside rows.jsonl.",
)
@click.option(
    "-n",
    "--samples",
    type=click.IntRange(1, 128),
    default=1,
    show_default=True,
    help="Answers of each teacher to each prompt.",
)
@click.option("--temperature", type=click.FloatRange(0, 2), help="[default: 0, of several samples 0.7]")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Longest answer; those that are cut off are dropped.",
)
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), help="Of samples.  [default: 0 here, none for endpoints]")
@click.option("--system", metavar="TEXT", help="System message for the teachers, which is not written into the rows.")
@click.option(
    "--schema",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON Schema: answers are asked for in it, and others are dropped.",
)
@click.option(
    "--best-by",
    type=click.Choice(["auto", "metric", "agreement", "judge", "first"]),
    default="auto",
    show_default=True,
    help="How the best answer is found; auto: by --judge where there is one, by the "
    "metric where rows have answers, else by agreement.",
)
@click.option("--judge", metavar="SPEC", help="A teacher that marks answers from 1 to 10.")
@click.option(
    "--min-score",
    type=click.FloatRange(0, 1),
    metavar="X",
    help="Drop prompts whose best answer scores less; a judge's 7 is 0.7.",
)
@click.option(
    "--held-out",
    type=click.Path(dir_okay=False, path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Leave out prompts like those in FILE, rows to measure with; may be repeated.",
)
@click.option("--rows", "max_rows", type=click.IntRange(1), metavar="N", help="Only the first so many prompts.")
@click.option(
    "--top-logprobs",
    type=click.IntRange(0, 20),
    default=0,
    show_default=True,
    metavar="K",
    help="Write the teachers' K most likely tokens at each token, for `train --set loss=mixed`.",
)
@click.option(
    "--student", metavar="MODEL", default=DEFAULT_MODEL, show_default=True,
    help="With --top-logprobs: the model that will be trained.",
)  # fmt: skip
@click.option("--from-cache", is_flag=True, help="Ask nobody: make rows of the answers that there are.")
@debug_option
def distill(**params: Any) -> int:
    """Let teachers answer the prompts of a file, and write the best answers as rows for `specserve train`.

    Answers are kept as they come: after Ctrl-C, a crash or --max-cost the same command goes on where it was and pays
    for nothing twice. Exit code 1 if some asks failed, which another run asks again.
    """
    from ..curation.distillation.distill import Distillation

    run = Distillation(_plan(params))
    try:
        summary = asyncio.run(run.run())
    except (UserError, KeyboardInterrupt):
        kept = sum(usage.requests + usage.cached for usage in run.usages.values())
        if kept:
            cost = sum(usage.cost for usage in run.usages.values())
            spent = f", for {cost:.4f} in this run" if cost else ""
            click.echo(
                f"stopped: {kept} answers are kept{spent}; the same command goes on from there, and --from-cache makes "
                "rows of what there is",
                err=True,
            )
        raise
    for line in summary.lines():
        click.echo(line, err=True)
    click.echo(f"{run.plan.out} is written, and {run.plan.summary_file.name} beside it", err=True)
    if refused := summary.dropped.get("refused or empty"):
        click.echo(f"{refused} prompts were refused, which is kept; --teacher-retry-refused asks again", err=True)
    if summary.asks_failed:
        click.echo(f"{summary.asks_failed} asks failed: remove {run.plan.out} to ask these again", err=True)
    return 1 if summary.asks_failed else 0


def _plan(params: dict[str, Any]) -> DistillPlan:
    from dataclasses import replace

    from ..curation.answer_schema import read_schema
    from ..curation.distillation.plan import DistillPlan

    budget_of(params)
    judge = teachers_of(params, [params["judge"]])[0] if params["judge"] else None
    shown = {name: value for name, value in params.items() if value not in (None, (), False)}
    return DistillPlan(
        teachers=tuple(replace(spec, cached_only=params["from_cache"]) for spec in teachers_of(params)),
        judge=None if judge is None else replace(judge, cached_only=params["from_cache"]),
        system=params["system"],
        schema=read_schema(params["schema"]) if params["schema"] is not None else None,
        top_logprobs=params["top_logprobs"],
        student=model_of(params["student"]),
        max_cost=params["max_cost"],
        settings={name: _plain(value) for name, value in shown.items()},
        **{name: params[name] for name in _PLAIN},
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else [*map(_plain, value)] if isinstance(value, tuple) else value
