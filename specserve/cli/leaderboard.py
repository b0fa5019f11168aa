"""`specserve leaderboard`: flags to the work in `specserve.leaderboard`."""

from pathlib import Path
from typing import Any

import click

from .options import Command, debug_option
from .teacher_options import TEACHER_HELP, endpoint_options

DEFAULT_BOARD = Path("leaderboard.sqlite3")


def _board(context: click.Context, param: click.Parameter, value: Path | None) -> Path:
    above = context.parent.params.get("board") if context.parent is not None else None
    return value or above or DEFAULT_BOARD


def board_option(command: Command) -> Command:
    """Before the subcommand's name or behind it."""
    return click.option(
        "--board", type=click.Path(dir_okay=False, path_type=Path), callback=_board, metavar="FILE",
        help=f"The leaderboard's file.  [default: {DEFAULT_BOARD}]",
    )(command)  # fmt: skip


@click.group()
@board_option
def leaderboard(board: Path) -> None:
    """Compare models on tasks: scores, speed, ratings, answers side by side.

    A board is one SQLite file. `run` makes what is missing and nothing twice.
    """


@leaderboard.command()
@click.argument("task")
@board_option
@click.option("--data", required=True, type=click.Path(path_type=Path), metavar="FILE", help="JSONL of held-out rows.")
@click.option(
    "--kind", type=click.Choice(["generate", "embed", "rerank", "classify"]), default="generate", show_default=True,
    help="What its models do.",
)  # fmt: skip
@click.option("--metric", metavar="NAME", help="Its score, as in exact_match.  [default: the trainer's main one]")
@click.option("--rows", type=click.IntRange(1), metavar="N", help="Only the first so many.  [default: all]")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Longest answer.")
@click.option("--system", metavar="TEXT", help="System message put before each row's.")
@click.option(
    "--floor", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True, metavar="X",
    help="Score that is worth nothing, as of guessing; averages count from there.",
)  # fmt: skip
@debug_option
def add(task: str, board: Path, data: Path, **params: Any) -> None:
    """Add TASK with its rows, or change the one of that name."""
    from ..leaderboard.store import open_board
    from ..leaderboard.task_rows import check_file, check_name, named_task

    check_name(task, "TASK")
    check_file(data)
    entry, data_hash, rows = named_task(data, **params)
    with open_board(board, create=True) as store:
        store.put_task(task, entry, data_hash, rows)
        click.echo(f"{task}: {f'{len(rows)} rows, ' if rows else ''}metric {entry.metric}, in {board}")


@leaderboard.command("add-model")
@click.argument("name")
@board_option
@click.option("--model", default="", metavar="MODEL", help="Directory or hub id.  [default: specserve's default model]")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="DIR", help="A LoRA of it.  [default: none]")
@debug_option
def add_model(name: str, board: Path, model: str, adapter: Path | None) -> None:
    """Add NAME to the models that are compared: a base model, or one with an adapter."""
    from ..leaderboard.candidates import checked_model
    from ..leaderboard.store import open_board
    from ..leaderboard.task_rows import check_name

    check_name(name, "NAME")
    entry = checked_model(model, adapter)
    with open_board(board, create=True) as store:
        store.put_model(name, entry)
        what = adapter if adapter is not None else "the base alone"
        click.echo(f"{name}: {entry.base or 'the default model'}, {what}; `specserve leaderboard run` measures it")


@leaderboard.command()
@click.argument("name")
@click.option("--task", "what", flag_value="task", help="The task of that name, where a model has it, too.")
@click.option("--model", "what", flag_value="model", help="The model of that name, where a task has it, too.")
@board_option
@debug_option
def remove(name: str, what: str | None, board: Path) -> None:
    """Remove the task or the model NAME, with its scores and its answers."""
    from ..leaderboard.removal import removed
    from ..leaderboard.store import open_board

    with open_board(board) as store:
        gone, num_answers = removed(store, name, what)
        click.echo(f"the {gone} {name} and {num_answers} answers are removed from {board}")


@leaderboard.command(epilog=TEACHER_HELP)
@board_option
@click.option("--task", "tasks", multiple=True, metavar="TASK", help="Only this one; repeat.")
@click.option("--model", "models", multiple=True, metavar="NAME", help="Only this one; repeat.")
@click.option("--batch", type=click.IntRange(1, 256), default=8, show_default=True, help="Answers at a time.")
@click.option(
    "--judge",
    metavar="SPEC",
    help="A model that compares answers pair by pair, as a teacher is named (below); with --model only pairs with one.",
)
@click.option(
    "--judge-rows", type=click.IntRange(1), default=20, show_default=True, metavar="N",
    help="With --judge: only the first so many rows of each task.",
)  # fmt: skip
@endpoint_options
@debug_option
def run(board: Path, tasks: tuple[str, ...], models: tuple[str, ...], batch: int, **params: Any) -> int:
    """Make all answers and scores that are missing, and show the table. Exit code 1 if a model failed.

    What depends on rows, models or settings that have changed is made again, the rest is kept. The same command goes on
    after Ctrl-C or a crash; another process may run other models of the same board meanwhile.
    """
    from ..leaderboard.runner import LeaderboardRunner
    from ..leaderboard.store import open_board

    with open_board(board) as store:
        ran = LeaderboardRunner(store, lambda line: click.echo(line, err=True), batch).run(tasks, models)
        click.echo(f"{ran.num_answers} answers were missing, {ran.num_kept} were there before", err=True)
        for name in ran.busy:
            click.echo(f"{name} is left to another process, which runs it now", err=True)
        if params["judge"] is not None:
            _judge(store, tasks, models, params)
        _show(store)
        return 1 if ran.failed else 0


def _judge(store: Any, tasks: tuple[str, ...], models: tuple[str, ...], params: dict[str, Any]) -> None:
    import asyncio

    from ..leaderboard.judging import judge_pairs
    from .teacher_options import budget_of, teachers_of

    (spec,) = teachers_of(params, [params["judge"]])
    num, failed, gone = asyncio.run(judge_pairs(store, spec, budget_of(params), params["judge_rows"], tasks, models))
    removed = f", {gone} on answers that were removed meanwhile" if gone else ""
    click.echo(f"{spec.name}: {num} verdicts, {failed} asks without one{removed}", err=True)


@leaderboard.command()
@board_option
@click.option("--json", "as_json", is_flag=True, help="All of it as JSON.")
@debug_option
def show(board: Path, as_json: bool) -> None:
    """Print the table."""
    from ..leaderboard.store import open_board

    with open_board(board, read_only=True) as store:
        _show(store, as_json)


def _show(store: Any, as_json: bool = False) -> None:
    from ..leaderboard.standings import standings
    from ..leaderboard.table import lines_of

    with store.snapshot():
        found = standings(store)
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=1))
    else:
        for line in lines_of(found):
            click.echo(line)


@leaderboard.command()
@board_option
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free one.")
@debug_option
def serve(board: Path, host: str, port: int) -> None:
    """Serve the board's page at /leaderboard/; it follows the file."""
    import asyncio

    from ..leaderboard.site import serve_until_stopped

    asyncio.run(serve_until_stopped(board, host, port, click.echo))


@leaderboard.command()
@click.argument("directory", type=click.Path(path_type=Path))
@board_option
@debug_option
def export(directory: Path, board: Path) -> None:
    """Write the page and its answers into DIRECTORY, to be opened or served from there."""
    from ..leaderboard.site import export as export_board

    num = export_board(board, directory)
    click.echo(f"{num} files in {directory}; open {directory / 'index.html'}")
