"""Makes API keys: a key on standard output, once, and its entry in the file of keys or beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ..errors import UserError
from ..server.access.key_file import DEFAULTS, entry_text, new_key, read_keys
from ..server.adapter_paths import check_name
from ..whole_files import replace_file


def make_key(name: str, file: Path | None, fields: dict[str, Any]) -> None:
    """Print a new key; its entry goes to the end of `file`, or to standard error. Raises `UserError`."""
    check_name(name, "name")
    if name == DEFAULTS:
        raise UserError(f"{DEFAULTS!r} is no name for a key: limits of all keys stand there; choose another")
    key = new_key()
    entry = entry_text(name, key, fields)
    if file is None:
        click.echo(f"the entry for --api-keys-file, which has no key in it:\n{entry}", err=True, nl=False)
    else:
        _append(file, name, entry)
        click.echo(
            f"{name} is in {file}; a server that runs reads it at SIGHUP. The key, which is shown once:", err=True
        )
    click.echo(key)


def _append(file: Path, name: str, entry: str) -> None:
    try:
        old = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        old = ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if old and name in {known.name for known in read_keys(file)}:
        raise UserError(
            f"{file} has {name!r} already; to replace its key, leave --file out and put the new hash beside the old "
            "one: sha256: [OLD, NEW]"
        )

    def write(path: Path) -> None:
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w", encoding="utf-8") as stream:
            stream.write(old + ("\n" if old and not old.endswith("\n") else "") + entry)
        read_keys(path)

    try:
        replace_file(file, write)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None
