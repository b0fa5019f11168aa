"""`specserve route`: flags; the work is in route_work.py, which imports what they need."""

from pathlib import Path

import click

from ..routing_profile import DEFAULT_PROMPTS, MAX_PROMPTS
from .options import debug_option


@click.group()
def route() -> None:
    """Look at how requests with model "auto" find their adapter."""


@route.command("profile")
@click.argument("adapter", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Its training rows, JSONL."
)
@click.option("--prompts", type=click.IntRange(1, MAX_PROMPTS), default=DEFAULT_PROMPTS, show_default=True)
@click.option("--system", metavar="TEXT", help="System message put before each row's, as data.system in training.")
@debug_option
def profile_command(adapter: Path, data: Path, prompts: int, system: str | None) -> int:
    """Write routing.json for the LoRA in ADAPTER, as `specserve train` does: some of its training prompts."""
    from .route_work import write

    return write(adapter, data, prompts, system)


@route.command("test")
@click.option("--adapters-dir", type=click.Path(path_type=Path), required=True, metavar="DIR")
@click.option(
    "--data", "files", multiple=True, required=True, metavar="[NAME=]FILE",
    help="Held-out rows of adapter NAME, or of 'base'; without it, the file's name says so (NAME.dev.jsonl). Repeat.",
)  # fmt: skip
@debug_option
def test_command(adapters_dir: Path, files: tuple[str, ...]) -> int:
    """Choose an adapter for every prompt of the files: a table of who got whose, and the time that a choice takes."""
    from .route_work import try_out

    return try_out(adapters_dir, files)
