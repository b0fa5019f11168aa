"""A sweep from a run file and a grid to a table: everything is checked, then the runs are trained (runner.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ...errors import UserError
from ...file_hash import file_hash
from ..data.rows import read_rows
from ..run_config import RunConfig
from ..run_file import absolute, check_ready, load_run
from .grid import Values, check_grid, config_of, names_of, parse_grid, points_of
from .halving import default_rungs
from .results import SweepDirectory, SweepPlan

GENERAL_FILE = Path(__file__).with_name("general.jsonl")


@dataclass(frozen=True, slots=True)
class SweepFlags:
    output: Path | None
    factor: int
    rungs: int | None
    forgetting_limit: float
    general: Path | None


def prepared_sweep(
    run_file: Path | None, overrides: Sequence[str], grid_texts: Sequence[str], flags: SweepFlags
) -> tuple[SweepDirectory, SweepPlan]:
    """Where the sweep is and what it does. Raises `UserError` for all that can be known before; writes nothing."""
    grid = parse_grid(grid_texts)
    points = points_of(grid)
    base = load_run(run_file, overrides, {})
    num_rungs = flags.rungs or default_rungs(len(points), flags.factor)
    directory = flags.output or (Path(f"{base.output}-sweep") if base.output else None)
    if directory is None:
        raise UserError("output is missing: name the directory of the sweep (--output DIR)", param="output")
    base = msgspec.structs.replace(base, output=base.output or "adapter")
    check_ready(base)
    plan = SweepPlan(
        base=absolute(base),
        points=dict(zip(names_of(points), points, strict=True)),
        factor=flags.factor,
        num_rungs=num_rungs,
        forgetting_limit=flags.forgetting_limit,
        general=str((flags.general or GENERAL_FILE).resolve()),
        data={key: file_hash(Path(file)) for key, file in _data_files(base).items()},
    )
    _check_points(base, grid, plan.base, points, num_rungs)
    if flags.forgetting_limit and base.task == "generate":
        read_rows(plan.general)
    return SweepDirectory(directory), plan


def _check_points(
    base: RunConfig,
    grid: Mapping[str, Sequence[Any]],
    settings: Mapping[str, Any],
    points: Sequence[Values],
    rungs: int,
) -> None:
    for point in points:  # unknown keys first: check_grid takes them for settings
        check_ready(config_of(settings, point))
    check_grid(base, grid, rungs)


def _data_files(base: RunConfig) -> dict[str, str]:
    return {"data.train": base.data.train} | ({"data.eval": base.data.eval} if base.data.eval else {})
