"""metrics.jsonl: one whole line a step, also when the disk fills up or the run is resumed.

A resumed run repeats the steps behind its checkpoint, so their old lines go. A line that cannot be written is taken
back, which is said once: it costs the line and not the run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..whole_files import append_whole, replace_file

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """The file in a run's directory, and the same for TensorBoard where that is installed."""

    def __init__(self, directory: Path, num_steps: int):
        """Open it behind the lines of the first `num_steps` steps."""
        path = directory / METRICS_FILE
        kept = [line for line in _lines(path) if _step_of(line) in range(1, num_steps + 1)]
        if path.is_file():
            replace_file(path, lambda temporary: temporary.write_bytes(b"".join(kept)))
        self._file = open(path, "ab", buffering=0)
        self._warned = False
        self._board = _tensorboard(directory)

    def write(self, values: dict[str, Any]) -> None:
        try:
            append_whole(self._file, json.dumps(values).encode() + b"\n")
        except OSError as error:
            if not self._warned:
                tqdm.write(f"warning: {METRICS_FILE} takes no more lines: {error.strerror}; training goes on")
            self._warned = True
        for name in ("loss", "head_loss", "lr", "grad_norm") if self._board is not None else ():
            if name in values:
                self._board.add_scalar(name, values[name], values["step"])

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()  # it keeps the last minutes in memory


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; none if there is no such file."""
    return [json.loads(line) for line in _lines(path) if _step_of(line) is not None]


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []


def _step_of(line: bytes) -> int | None:
    """The step of a line; None for one that was torn."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def _tensorboard(directory: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(directory / "tensorboard"))
