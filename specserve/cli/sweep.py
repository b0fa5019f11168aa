"""`specserve sweep`: flags to a sweep; the work is in `specserve.training.sweep`."""

from pathlib import Path
from typing import Any

import click

from .options import debug_option


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path))
@click.option(
    "--grid",
    "grid",
    multiple=True,
    metavar="KEY=VALUE,VALUE",
    help="A setting of the run and its values, as in --grid lora.r=8,16; repeat: every combination is a run.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of all runs.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="DIR", help="The sweep's.  [default: the run's, and -sweep]"
)
@click.option("--factor", type=click.IntRange(2), default=3, show_default=True, help="One run of so many goes on.")
@click.option(
    "--rungs",
    type=click.IntRange(1, 8),
    metavar="N",
    help="How often that is decided, and once more: 1 trains all runs to the end.  [default: by the grid, at most 3]",
)
@click.option("--jobs", type=click.IntRange(1, 64), default=1, show_default=True, help="Runs at a time.")
@click.option(
    "--forgetting-limit",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    metavar="X",
    help="Marks runs whose perplexity on general text is more than so many times the base model's; 0: not measured.",
)
@click.option(
    "--general",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSONL of that text, in a format of training rows.  [default: 24 short conversations]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
@debug_option
def sweep(run_file: Path, grid: tuple[str, ...], overrides: tuple[str, ...], **params: Any) -> int:
    """Train the run of RUN_FILE with every combination of --grid's values, and keep the best going.

    All runs are trained for a share of their steps, one of --factor goes on from its checkpoint, and so on (successive
    halving). The same command goes on after Ctrl-C or a crash, and prints the table again when all is done. Exit code 1
    if every finished run collapsed.
    """
    from ..training.sweep.report import lines_of, table_of, write_report
    from ..training.sweep.runner import Sweep
    from ..training.sweep.sweep import SweepFlags, prepared_sweep

    names = ("output", "factor", "rungs", "forgetting_limit", "general")
    flags = SweepFlags(**{name: params[name] for name in names})
    directory, plan = prepared_sweep(run_file, overrides, grid, flags)
    click.echo(f"{len(plan.points)} runs, {plan.num_rungs} rungs, in {directory.path}", err=True)
    outcome = Sweep(directory, plan, params["jobs"], lambda line: click.echo(line, err=True)).run()
    table = table_of(directory, outcome)
    write_report(directory, table)
    if params["as_json"]:
        click.echo((directory.path / "table.json").read_text(encoding="utf-8"), nl=False)
    else:
        click.echo("\n".join(lines_of(table)))
        click.echo(f"report: {directory.path / 'report.html'}", err=True)
    return 0 if table["best"] is not None else 1
