"""`specserve store`: adapters that many servers share, in a folder or a bucket."""

from __future__ import annotations

import re
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from ..errors import UserError
from .options import Command, debug_option

if TYPE_CHECKING:
    from ..server.shared_store.store import SharedStore

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def store_option(command: Command) -> Command:
    return click.option(
        "--store", "url", envvar="SPECSERVE_SHARED_STORE", required=True, show_envvar=True, metavar="URL",
        help="A folder, or an address of fsspec's such as s3://bucket/loras.",
    )(command)  # fmt: skip


class Age(click.ParamType):
    """90s, 15m, 24h or 7d, as seconds."""

    name = "age"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, str):
            match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value)
            if match is None:
                self.fail(f"{value!r} is no age; write 90s, 15m, 24h or 7d", param, ctx)
            return float(match[1]) * UNITS[match[2]]
        return value


class Row(msgspec.Struct):
    """What `list` shows of a name, or of a version that has none."""

    name: str | None
    version: str
    is_whole: bool
    size_bytes: int | None = None
    content_hash: str | None = None
    pushed_at: float | None = None


@click.group()
def store() -> None:
    """Keep adapters where many servers serve them from (--shared-store).

    Each content is there once, under the hash of its files; names point to hashes. Servers see a change of a name
    within seconds, and serve the old content until the new one is loaded.
    """


@store.command()
@click.argument("directory", type=click.Path(path_type=Path))
@store_option
@click.option("--name", metavar="NAME", help="The adapter's name.  [default: the folder's]")
@click.option("--no-name", is_flag=True, help="Only bring the content there; `point` gives it a name.")
@debug_option
def push(directory: Path, url: str, name: str | None, no_name: bool) -> None:
    """Bring the adapter in DIRECTORY to the store, then let its name mean it.

    What is killed meanwhile changes nothing. The same content is stored once; one that is damaged there is mended.
    """
    from ..server.shared_store.store import SharedStore

    if name is not None and no_name:
        raise click.UsageError("give --name or --no-name")
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; a PEFT LoRA directory is expected", param="DIRECTORY")
    wanted = None if no_name else name or directory.resolve().name
    version, is_new = SharedStore(url).push(directory, wanted)
    click.echo(f"{wanted or 'no name'} -> {version}{'' if is_new else ' (was there)'}")


@store.command("list")
@store_option
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@debug_option
def list_(url: str, as_json: bool) -> int:
    """Show names, what they mean, and versions without names. Exit code 1 if something is not whole."""
    from ..server.shared_store.store import SharedStore

    shared = SharedStore(url)
    meanings = {name: meant.version for name in shared.names() if (meant := shared.named(name)) is not None}
    unnamed = [version for version in shared.versions() if version not in meanings.values()]
    rows = [_row(shared, name, version) for name, version in [*meanings.items(), *((None, each) for each in unnamed)]]
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(rows)).decode())
    elif not rows:
        click.echo(f"nothing is in {url} yet; specserve store push DIRECTORY", err=True)
    else:
        for row in rows:
            click.echo(_line(row))
    return int(any(row.name is not None and not row.is_whole for row in rows))


def _row(shared: SharedStore, name: str | None, version: str) -> Row:
    found = shared.version(version) if (is_whole := shared.is_whole(version)) else None
    if found is None:
        return Row(name, version, is_whole)
    return Row(name, version, is_whole, found.num_bytes, found.content_hash, found.pushed_at)


def _line(row: Row) -> str:
    if row.size_bytes is None or row.pushed_at is None:
        return f"{row.name or '-':<32} {row.version[:16]}  not whole"
    at = datetime.fromtimestamp(row.pushed_at).strftime("%Y-%m-%d %H:%M")
    return f"{row.name or '-':<32} {row.version[:16]}  {row.size_bytes / 2**20:8.1f} MiB  {at}"


@store.command()
@click.argument("name")
@click.argument("version")
@store_option
@debug_option
def point(name: str, version: str, url: str) -> None:
    """Let NAME mean VERSION, a hash or the beginning of one: back to an older content, or a second name."""
    from ..server.shared_store.store import SharedStore

    click.echo(f"{name} -> {SharedStore(url).point(name, version)}")


@store.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@store_option
@debug_option
def remove(names: tuple[str, ...], url: str) -> None:
    """Take names away. Requests that run finish; what the names meant stays until it is pruned."""
    from ..server.shared_store.store import SharedStore

    shared = SharedStore(url)
    missing = [name for name in names if not shared.remove(name)]
    if missing:
        raise UserError(f"{url} has no name {', '.join(map(repr, missing))}; `specserve store list` shows them")


@store.command()
@store_option
@click.option(
    "--older-than", type=Age(), default="24h", show_default=True, metavar="AGE",
    help="Only what was pushed before: who has just read a name may still want it.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only show what would go.")
@debug_option
def prune(url: str, older_than: float, dry_run: bool) -> None:
    """Remove versions that no name means, and what was left by pushes that were killed."""
    from ..server.shared_store.store import SharedStore

    started = time.monotonic()
    gone = SharedStore(url).prune(older_than, is_dry=dry_run)
    for version in gone:
        click.echo(version)
    what = "would go" if dry_run else "went"
    click.echo(f"{len(gone)} versions {what} ({time.monotonic() - started:.1f} s)", err=True)
