"""The work of `specserve route`: profiles for adapters that have none, and how well prompts find their adapter.

Needs neither a model nor a server: texts are compared to profiles by the code that the server uses.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from ..adapter_files import CONFIG_FILE, POOLING_FILE, read_extra
from ..errors import UserError
from ..routing_profile import (
    MAX_PROFILE_BYTES,
    PROFILE_FILE,
    parse_profile,
    profile_of,
    write_profile,
)
from ..server.routing.likeness import Likeness, likeness_of
from ..server.routing.router import choice_of
from ..training.data.rows import parse_object, parse_row, read_rows, routed_texts, row_texts

BASE = "base"


def write(directory: Path, data: Path, num_prompts: int, system: str | None) -> int:
    """Write the profile of the adapter in `directory`, which was trained on `data`. Raises `UserError`."""
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"{directory} has no {CONFIG_FILE}; a PEFT LoRA directory is expected", param="adapter")
    if (directory / POOLING_FILE).exists():
        raise UserError(f"{directory} has a {POOLING_FILE}: it does not generate, and is never chosen", param="adapter")
    profile = profile_of(routed_texts(read_rows(data), system), num_prompts)
    if not profile.prompts:
        raise UserError(f"{data} has no prompt with any text", param="data")
    write_profile(directory, profile)
    click.echo(f"{directory / PROFILE_FILE} has {len(profile.prompts)} prompts of {data}")
    return 0


def try_out(adapters_dir: Path, files: Sequence[str]) -> int:
    """Route every prompt of `files`, each NAME=FILE or FILE, and print who got it. Exit code 1: there is no profile."""
    likely = likely_in(adapters_dir)
    if not likely:
        click.echo(f"no adapter in {adapters_dir} has a {PROFILE_FILE}; `specserve route profile` writes one", err=True)
        return 1
    table: dict[str, Counter[str]] = {}
    seconds, num = 0.0, 0
    for wanted, path in [labelled(file, likely) for file in files]:
        counts = table.setdefault(wanted, Counter())
        for text in prompts_of(path):
            start = time.perf_counter()
            counts[choice_of(text, likely).adapter or BASE] += 1
            seconds, num = seconds + time.perf_counter() - start, num + 1
    if not num:
        raise UserError(f"there are no prompts in {', '.join(files)}", param="data")
    for line in report_of(table, [*likely, BASE]):
        click.echo(line)
    click.echo(f"{1e6 * seconds / num:.0f} microseconds a request, {len(likely)} profiles")
    return 0


def likely_in(adapters_dir: Path) -> dict[str, Likeness]:
    """By name, the adapters in a folder that can be chosen. Raises `AdapterError` for a profile that is no good."""
    if not adapters_dir.is_dir():
        raise UserError(f"{adapters_dir} is not a directory", param="adapters_dir")
    found = {}
    for directory in sorted(path.parent for path in adapters_dir.glob(f"*/{CONFIG_FILE}")):
        if (directory / POOLING_FILE).exists():
            continue
        body = read_extra(directory, directory.name, PROFILE_FILE, MAX_PROFILE_BYTES)
        if body is not None:
            found[directory.name] = likeness_of(parse_profile(body, str(directory / PROFILE_FILE)))
    return found


def prompts_of(path: Path) -> Iterator[str]:
    """Of rows as training has them, and of rows with nothing but a prompt. Raises `UserError`."""
    for number, line in row_texts(path):
        where = f"{path} line {number}"
        value = parse_object(line, where)
        if value.keys() == {"prompt"} and isinstance(value["prompt"], str):
            yield value["prompt"]
        else:
            yield from routed_texts([parse_row(line, number, where)])


def labelled(file: str, names: dict[str, Likeness]) -> tuple[str, Path]:
    """(who its prompts are for, path) of NAME=FILE, or of FILE whose name begins with that of an adapter or `base`."""
    name, separator, path = file.partition("=")
    if not separator:
        name, path = Path(file).name.partition(".")[0], file
    if name not in (*names, BASE):
        raise UserError(
            f"--data {file}: {name!r} is neither an adapter with a profile ({', '.join(names)}) nor {BASE!r}; say "
            "whose prompts these are with NAME=FILE",
            param="data",
        )
    return name, Path(path)


def report_of(table: dict[str, Counter[str]], columns: Sequence[str]) -> list[str]:
    """A row for each wanted choice, a column for each that was made, and the shares that were right."""
    width = max(map(len, (*columns, *table, "wanted")))
    lines = [" ".join(text.rjust(width) for text in ("wanted", *columns, "right"))]
    for wanted, counts in table.items():
        cells = [str(counts[column]) for column in columns]
        share = f"{100 * counts[wanted] / max(1, counts.total()):.1f} %"
        lines.append(" ".join(text.rjust(width) for text in (wanted, *cells, share)))
    right, total = sum(table[wanted][wanted] for wanted in table), sum(c.total() for c in table.values())
    lines.append(f"{right} of {total} right: {100 * right / total:.1f} %")
    return lines
