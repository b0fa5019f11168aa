"""Options that several benches have, in one wording: the model, lists of numbers, adapters with their rows, --save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
ADAPTER = click.Path(exists=True, file_okay=False, path_type=Path)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

model = click.option("--model", default="", help="Base model; default: specserve's default model.")
adapter = click.argument("adapter", type=ADAPTER)
adapters = click.argument("adapters", nargs=-1, required=True, type=ADAPTER)


class Numbers(click.ParamType):
    name = "numbers"

    def __init__(self, least: int = 1):
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            numbers = [int(part) for part in value.split(",")]
        except ValueError:
            numbers = []
        if not numbers or min(numbers) < self.least:
            self.fail(f"{value!r} is not a list of whole numbers above {self.least - 1}, such as 1,8", param, ctx)
        return numbers


def numbers(flag: str, default: str, help: str | None = None, least: int = 1) -> Decorator:
    return click.option(flag, type=Numbers(least), default=default, show_default=True, help=help)


def at_least(least: int, flag: str, default: int, help: str | None = None) -> Decorator:
    """A whole number of `least` or more."""
    return click.option(flag, type=click.IntRange(least), default=default, show_default=True, help=help)


def rounds(default: int) -> Decorator:
    return at_least(1, "--rounds", default)


def for_each_adapter(flag: str) -> Decorator:
    return click.option(flag, multiple=True, required=True, type=FILE, help="One for each adapter.")


def file(flag: str, help: str | None = None) -> Decorator:
    return click.option(flag, required=True, type=FILE, help=help)


def save(name: str, default: bool = True) -> Decorator:
    text = f"Append the result to bench/results/{name}.jsonl."
    return click.option("--save/--no-save", default=default, show_default=True, help=text)


def check_one_each(adapters: Sequence[Path], **files: Sequence[Path]) -> None:
    for name, given in files.items():
        if len(given) != len(adapters):
            raise click.UsageError(
                f"{len(adapters)} adapters but {len(given)} files of --{name}; give one for each adapter"
            )
