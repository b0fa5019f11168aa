"""`specserve synthesize`: flags to a synthesis, its report to lines; the work is in `specserve.curation.synthesis`."""

from pathlib import Path
from typing import Any

import click

from ..errors import UserError
from .options import debug_option
from .teacher_options import TEACHER_HELP, budget_of, teacher_options, teachers_of

_FILE = click.Path(dir_okay=False, path_type=Path)


def _renamed(context: click.Context, param: click.Parameter, value: str | None) -> None:
    """Elsewhere --max-tokens is the longest answer; who means that, or these flags' old sense, is told."""
    if value is not None:
        raise click.UsageError(
            "--min-tokens and --max-tokens of a row are --min-row-tokens and --max-row-tokens; the longest answer is "
            "--max-answer-tokens"
        )


@click.command(epilog=TEACHER_HELP)
@click.option("--seeds", type=_FILE, metavar="FILE", help="JSONL of some rows of the task, of any format that trains.")
@click.option("--task", default="", metavar="TEXT", help="What the rows are for, in a sentence or two.")
@click.option("--output", "out", type=_FILE, required=True, metavar="FILE", help="JSONL of the new rows.")
@click.option("--rows", type=click.IntRange(1), default=100, show_default=True, help="So many new rows.")
@click.option(
    "--method", type=click.Choice(["single", "refine"]), default="single", show_default=True,
    help="refine: each row is criticised by the teacher, and written once more or dropped.",
)  # fmt: skip
@click.option("--inputs-only", is_flag=True, help="Rows without answers, for `specserve distill`.")
@click.option("--include-seeds", is_flag=True, help="Write the seeds in front of the new rows.")
@click.option("--schema", type=_FILE, metavar="FILE", help="JSON Schema that answers keep to.")
@click.option(
    "--held-out", type=_FILE, multiple=True, metavar="FILE", help="No row like those in FILE; may be repeated."
)
@click.option("--examples", type=click.IntRange(1, 64), default=4, show_default=True, help="Seeds that an ask shows.")
@click.option(
    "--per-ask", type=click.IntRange(1, 64), default=4, show_default=True,
    help="Inputs that one answer proposes; 1 for small teachers.",
)  # fmt: skip
@click.option(
    "--vary", multiple=True, metavar="TEXT",
    help="Asks say this in turns, as in 'Let it be about billing.'; may be repeated.  [default: six general ones]",
)  # fmt: skip
@click.option(
    "--near",
    type=float,
    default=0.7,
    show_default=True,
    metavar="X",
    help="Similarity of near duplicates, from 0.3 to 1.",
)
@click.option(
    "--min-row-tokens", "min_tokens", type=click.IntRange(1),
    help="Of a row's input and answer, by the tokenizer of --model.",
)  # fmt: skip
@click.option("--max-row-tokens", "max_tokens", type=click.IntRange(1))
@click.option("--min-tokens", "old_min_tokens", hidden=True, expose_value=False, callback=_renamed)
@click.option("--max-tokens", "old_max_tokens", hidden=True, expose_value=False, callback=_renamed)
@click.option(
    "--max-answer-tokens", type=click.IntRange(1), help="Longest answer.  [default: half as long again as the seeds']"
)
@click.option("--temperature", type=click.FloatRange(0, 2), default=1.0, show_default=True, help="Of proposals.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Other rows for another.")
@click.option("--embedder", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Adapter that embeds: the report then has the spread of topics.")  # fmt: skip
@click.option("--model", default="", help="Base model of --embedder, whose tokens are counted.  [default: the default]")
@click.option(
    "--apply", type=_FILE, metavar="REVIEW", help="Only write the rows that this review file keeps to --output."
)
@teacher_options(required=False)
@debug_option
def synthesize(**params: Any) -> int:
    """Make new rows from a few: a teacher invents inputs like those of the seeds, and answers them.

    What repeats a seed, another row or a held-out row is dropped, and so is what breaks the schema or the limits.
    Beside OUT.jsonl stand OUT.review.jsonl, every candidate with its verdict, and OUT.report.json. Edit "keep" in the
    review file and give it to --apply. After a crash or Ctrl-C the same command goes on where it was; with a larger
    --rows it makes more. Exit code 1 if there are fewer rows than were wanted.
    """
    if params["apply"] is not None:
        return _apply(params)
    for name in ("seeds", "task", "teachers"):
        if not params[name]:
            flag = "--teacher" if name == "teachers" else f"--{name}"
            raise click.UsageError(f"{flag} is missing")
    from ..curation.synthesis.report import summary_of
    from ..curation.synthesis.run import Options, review_of
    from ..curation.synthesis.run import synthesize as run

    (spec,) = teachers_of(params)
    options = Options(**{name: params[name] for name in Options.__dataclass_fields__})
    try:
        report = run(options, spec, budget_of(params), lambda line: click.echo(line, err=True))
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on where it was", err=True)
        raise
    for line in summary_of(report):
        click.echo(line)
    click.echo(f"{options.out} is written; look at {review_of(options.out)} before you train on it")
    return 0 if report["rows"] >= options.rows else 1


def _apply(params: dict[str, Any]) -> int:
    from ..curation.synthesis.run import apply_review

    if params["include_seeds"] and params["seeds"] is None:
        raise UserError("--include-seeds needs --seeds FILE", param="seeds")
    num = apply_review(params["apply"], params["out"], params["seeds"] if params["include_seeds"] else None)
    click.echo(f"{params['out']} has {num} rows")
    return 0
