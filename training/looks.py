"""What may be asked of a run or an adapter without training, whatever its task: its data, its time, its worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapter_files import POOLING_FILE
from .run_config import RunConfig


def look_at_data(config: RunConfig) -> int:
    """Print what is in the rows; returns the number of problems."""
    if config.task != "generate":
        from .pooling.check import report_pooling_data

        return report_pooling_data(config)
    from .data.check import report_data

    return report_data(config)


def look_at_time(config: RunConfig) -> None:
    """Print how long a run would take, from a little of it."""
    if config.task != "generate":
        from .pooling.estimate import report_pooling_estimate
        from .pooling.prepare import prepare_pooling

        report_pooling_estimate(prepare_pooling(config))
        return
    from .estimate import report_estimate
    from .preflight import prepare

    report_estimate(prepare(config))


def evaluate_any(directory: Path, data: Path | None, rows: int | None, max_tokens: int) -> dict[str, Any]:
    """Measure a finished adapter and write its report again; returns the report."""
    if (directory / POOLING_FILE).is_file():
        from .pooling.evaluate import evaluate_pooling_directory

        return evaluate_pooling_directory(directory, data, rows)
    from .evaluation.evaluate import evaluate_directory

    return evaluate_directory(directory, data, rows, max_tokens=max_tokens)
