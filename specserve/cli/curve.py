"""`specserve curve`: flags to a sweep over the number of rows; the work is in `specserve.training.sweep`."""

from pathlib import Path

import click

from .options import debug_option


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path))
@click.option(
    "--doublings", type=click.IntRange(1, 16), default=3, show_default=True, metavar="N",
    help="So often the number of rows is doubled, up to all of them.",
)  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of all runs.")
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="DIR", help="The curve's.  [default: the run's, and -curve]"
)
@debug_option
def curve(run_file: Path, doublings: int, overrides: tuple[str, ...], output: Path | None) -> int:
    """Train the run of RUN_FILE on an eighth, a quarter, a half and all of its rows, to see what more rows bring.

    Rows are taken from the beginning of data.train, and all runs are measured on the same held-out rows (data.eval).
    Writes a table, curve.json, curve.html and curve.png. The same command goes on after Ctrl-C or a crash.
    """
    from ..training.sweep.data_curve import curve_of, lines_of, prepared_curve, write_curve
    from ..training.sweep.runner import Sweep

    directory, plan = prepared_curve(run_file, overrides, output, doublings)
    click.echo(f"{len(plan.points)} runs in {directory.path}", err=True)
    outcome = Sweep(directory, plan, 1, lambda line: click.echo(line, err=True)).run()
    found = curve_of(directory, outcome)
    write_curve(directory, found)
    click.echo("\n".join(lines_of(found)))
    click.echo(f"report: {directory.path / 'curve.html'}", err=True)
    return 0
