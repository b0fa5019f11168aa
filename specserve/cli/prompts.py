"""`specserve prompts`: flags to a search for a model's own prompts; the work is in `specserve.curation.own_prompts`."""

from pathlib import Path
from typing import Any

import click

from ..teachers.spec import DEFAULT_MODEL
from .options import debug_option
from .teacher_options import TEACHER_HELP, budget_of, teacher_options, teachers_of

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(epilog=TEACHER_HELP)
@click.option("--output", "out", type=_FILE, required=True, metavar="FILE", help="JSONL of the prompts.")
@click.option("--rows", type=click.IntRange(1), default=2000, show_default=True, help="So many prompts.")
@click.option(
    "--held-out", type=_FILE, multiple=True, metavar="FILE", help="No prompt like those in FILE; may be repeated."
)
@click.option("--near", type=float, default=0.7, show_default=True, metavar="X",
              help="Similarity of near duplicates, from 0.3 to 1.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(4), default=96, show_default=True, help="Longest prompt.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=1.0, show_default=True)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Others for another.")
@teacher_options(required=False, default=DEFAULT_MODEL)
@debug_option
def prompts(**params: Any) -> int:
    """Write prompts that a model itself takes for a user's, such as its head can be trained on.

    The teacher, a model that runs here, goes on from the chat template's beginning of a user's turn.
    `specserve train --head-only --base` trains on them as they are, `specserve distill` has a teacher answer them.
    After a crash or Ctrl-C the same command goes on where it was. Exit code 1 if there are fewer prompts than were
    wanted.
    """
    from ..curation.own_prompts import Options, told, write_own_prompts

    (spec,) = teachers_of(params)
    options = Options(**{name: params[name] for name in Options.__dataclass_fields__})
    try:
        found = write_own_prompts(options, spec, budget_of(params), lambda line: click.echo(line, err=True))
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on where it was", err=True)
        raise
    click.echo(f"{options.out} has {len(found.prompts)} prompts of {found.num_asked} texts; {told(found.dropped)}")
    if found.ended:
        click.echo(f"warning: {found.ended}", err=True)
    return 1 if found.ended else 0
