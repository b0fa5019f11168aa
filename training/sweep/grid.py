"""What a sweep tries: every combination of the values of some settings, each a run's configuration with a name.

Values are YAML and go through the run's own configuration, so that a wrong one is refused before anything starts. Knows
nothing of how the runs are trained.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ...errors import UserError
from ...strict_yaml import strict_loader
from ..run_config import RunConfig
from ..run_file import flatten, load_run

MAX_POINTS = 1000
# Runs that differ in these have nothing in common that they could be compared by.
_SAME = (
    "output", "task", "model", "data.eval", "eval.rows", "eval.max_tokens", "eval.corpus_rows",
    "lora.enabled", "lora.frozen",  # heads alone have another score
)  # fmt: skip
# Losses that differ in these cannot be compared before the runs are finished.
_OF_THE_LOSS = ("embed.temperature", "embed.symmetric", "embed.dimensions", "rerank.loss", "classify.class_weights")
_NAME_LEN = 48

Values = dict[str, Any]


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Dotted key -> its values, of "lora.r=8,16" and "lora.target_modules=all-linear,[q_proj, v_proj]".

    Raises `UserError` for what is no such list, an empty one, or a value that stands twice.
    """
    grid: dict[str, list[Any]] = {}
    for text in texts:
        key, separator, listed = text.partition("=")
        key = key.strip()
        if not separator or not key:
            raise UserError(f"--grid {text!r} is not KEY=VALUE,VALUE, as in --grid lora.r=8,16", param="grid")
        if key in grid:
            raise UserError(f"--grid {key} stands twice; give all of its values in one", param=key)
        try:
            values = yaml.load(f"[{listed}]", Loader=strict_loader())  # derived from SafeLoader
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or error
            raise UserError(f"--grid {text!r}: the values are not YAML: {problem}", param=key) from None
        if not values:
            raise UserError(f"--grid {key} has no values; give some, as in --grid lora.r=8,16", param=key)
        twice = next((value for idx, value in enumerate(values) if value in values[:idx]), None)
        if twice is not None:
            raise UserError(f"--grid {key} has the value {twice!r} twice", param=key)
        grid[key] = values
    return grid


def points_of(grid: Mapping[str, Sequence[Any]]) -> list[Values]:
    """Every combination, the last key's values first. Raises `UserError` for none, one, or too many."""
    num = 1
    for values in grid.values():
        num *= len(values)
    if not grid:
        raise UserError("nothing is swept: give settings and their values, as in --grid lora.r=8,16", param="grid")
    if num == 1:
        raise UserError("the grid has one point, which is a run: use `specserve train` with --set", param="grid")
    if num > MAX_POINTS:
        raise UserError(f"the grid has {num} points, and {MAX_POINTS} is the most; leave some values out", param="grid")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def check_grid(base: RunConfig, grid: Mapping[str, Sequence[Any]], num_rungs: int) -> None:
    """Raises `UserError` for what cannot be compared."""
    for key in grid:
        if key in _SAME:
            raise UserError(
                f"--grid {key}: runs that differ in it cannot be compared; make a sweep for each, or put the finished "
                "adapters on a leaderboard (`specserve leaderboard`)",
                param=key,
            )
        if key in _OF_THE_LOSS and num_rungs > 1:
            raise UserError(
                f"--grid {key} changes the loss by which unfinished runs are compared; train all of them to the end "
                "with --rungs 1",
                param=key,
            )
    if not base.data.eval or base.eval.rows == 0:
        what = "eval.rows is 0" if base.data.eval else "data.eval is missing"
        raise UserError(f"{what}: a sweep compares its runs by held-out rows (data.eval: FILE)", param="data.eval")


def config_of(base: Mapping[str, Any], point: Values) -> RunConfig:
    """Of the nested settings `base` with those of `point`; raises `UserError` naming the key, the value and the limit.

    A null means what it means in a run file: the default.
    """
    return load_run(None, [], {**dict(flatten(base)), **point})


def names_of(points: Sequence[Values]) -> list[str]:
    """A folder's name for each: its number, and its values as far as they make one."""
    width = len(str(len(points)))
    return [f"{idx:0{width}}-{_slug(point)}" for idx, point in enumerate(points, 1)]


def shown(point: Values) -> str:
    """For people: "lora.r=8 lora.alpha=16"."""
    return " ".join(f"{key}={_text(value)}" for key, value in point.items())


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _slug(point: Values) -> str:
    parts = [f"{key.rpartition('.')[2]}-{_text(value)}" for key, value in point.items()]
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", "_".join(parts))[:_NAME_LEN].rstrip("_.+-")
