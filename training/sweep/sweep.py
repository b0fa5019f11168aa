"""A sweep from a run file and a grid to a table: everything is checked, then the runs are trained (runner.py)."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ...errors import UserError
from ...file_hash import input_hash
from ...model.config import ModelConfig
from ...model.store import resolve_model
from ...text.special_tokens import eos_token_ids
from ..data.dataset import tokenize
from ..data.rows import Row, read_rows
from ..data.teacher_logits import existing_logits
from ..preflight import tokenizer_of
from ..run_config import RunConfig
from ..run_file import absolute, check_ready, load_run
from .grid import check_grid, config_of, names_of, parse_grid, points_of
from .halving import default_rungs
from .results import SWEEP_FILE, SweepDirectory, SweepPlan

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
    settings, general = absolute(base), str((flags.general or GENERAL_FILE).resolve())
    settings["data"]["date"] = settings["data"]["date"] or _day_of(SweepDirectory(directory))
    configs = [config_of(settings, point) for point in points]
    for config in configs:  # unknown keys first: check_grid takes them for settings
        check_ready(config)
    check_grid(base, grid, num_rungs)
    files = [file for config in configs for file in _files_of(config)]
    looks_at_general = bool(flags.forgetting_limit) and base.task == "generate"
    if looks_at_general:
        files.append(general)
    _check_model(base, read_rows(general) if looks_at_general else [])
    plan = SweepPlan(
        base=settings,
        points=dict(zip(names_of(points), points, strict=True)),
        factor=flags.factor,
        num_rungs=num_rungs,
        forgetting_limit=flags.forgetting_limit,
        general=general,
        files={file: input_hash(Path(file)) for file in dict.fromkeys(files)},
    )
    return SweepDirectory(directory), plan


def _day_of(directory: SweepDirectory) -> str | None:
    """When the sweep began: all its runs have the same rows where the chat template writes the date."""
    if not (directory.path / SWEEP_FILE).is_file():
        return datetime.date.today().isoformat()
    day: str | None = directory.plan().base["data"].get("date")
    return day


def _check_model(base: RunConfig, general: Sequence[Row]) -> None:
    """That the base model can be trained on, and writes the rows on which its runs are judged. Raises `UserError`."""
    model_dir = resolve_model(base.model)
    vocab_size = ModelConfig.from_dir(model_dir).vocab_size
    if general:
        tokenize(general, tokenizer_of(base, model_dir), eos_token_ids(model_dir), vocab_size=vocab_size)


def _files_of(config: RunConfig) -> list[str]:
    """What a run reads of rows, and of a teacher's opinion of them."""
    files = [config.data.train, *([config.data.eval] if config.data.eval else [])]
    if config.loss != "ce" and not config.teacher:
        files.append(str(existing_logits(Path(config.data.train))))
    return files
