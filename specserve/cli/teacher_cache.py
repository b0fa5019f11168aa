"""`specserve teacher-cache`: what is kept of teachers' answers, and how to be rid of it."""

import time
from pathlib import Path

import click

from ..cache_dirs import cache_dir
from ..errors import UserError
from .options import debug_option

_DAY_S = 86_400.0


@click.command("teacher-cache")
@click.option(
    "--teacher-cache", "directory", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Another folder than ~/.cache/specserve/teachers.",
)  # fmt: skip
@click.option("--clear", is_flag=True, help="Remove answers; what is asked again then is paid for again.")
@click.option("--teacher", metavar="NAME", help="With --clear: only of this teacher, as it is listed.")
@click.option(
    "--unused-days", type=click.FloatRange(0), metavar="N", help="With --clear: only those not used for so long."
)
@debug_option
def teacher_cache(directory: Path | None, clear: bool, teacher: str | None, unused_days: float | None) -> None:
    """Show what is kept of teachers' answers, by teacher, or remove it.

    distill, synthesize, label and leaderboard share it. Running commands hold it, and it is not removed under them.
    """
    from ..teachers.answer_cache import FILE, AnswerCache

    if not clear and (teacher is not None or unused_days is not None):
        raise UserError("--teacher and --unused-days choose what --clear removes; give that, too", param="clear")
    directory = directory or cache_dir("teachers")
    if not (directory / FILE).exists():
        click.echo(f"no teacher was asked yet: there is no {directory / FILE}")
        return
    cache = AnswerCache(directory)
    try:
        if clear:
            _clear(cache.clear(teacher, (unused_days or 0.0) * _DAY_S), teacher, [one.teacher for one in cache.kept()])
        click.echo(f"{cache.path}: {_shown(cache.num_bytes)}")
        for one in cache.kept():
            used = time.strftime("%Y-%m-%d", time.localtime(one.used_at)) if one.used_at else "long ago"
            click.echo(f"  {one.num:8} {_shown(one.num_bytes):>10}  last used {used}  {one.teacher}")
    finally:
        cache.close()


def _clear(num: int, teacher: str | None, known: list[str]) -> None:
    if not num and teacher is not None and teacher not in known:
        raise UserError(
            f"nothing is kept of {teacher!r}; names are as they are listed without --clear", param="teacher"
        )
    click.echo(f"{num} answers are removed")


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
