"""What steps cost on this machine, kept from one start to the next: timing all shapes is most of a small model's start.

Owns one file for each way to compute steps. What it says is believed where a few steps still stand to each other as
they did then, and taken with the speed that the machine has now; else everything is timed again, and kept. A file that
cannot be read or written costs its time and nothing else. No torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import platform
import tempfile
from pathlib import Path

import msgspec

from .cost_model import MEASURED_ROWS, CostModel, MeasuredCosts, TimedStep

logger = logging.getLogger(__name__)

_CHECKED_ROWS = (1, 16)  # steps that weights take, and steps that arithmetic has a part in
_CHECKS = 3  # of each; the fastest counts
_MAX_SPEED = 4.0  # how much faster or slower the whole machine may be; steps teach the rest
_MAX_TILT = 1.5  # and how much more that may hold for one of these steps than for the other


def costs_file(*key: object) -> Path:
    """Where the costs of what `key` says are kept; equal keys compute steps in the same way."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "specserve" / "step_costs"
    text = repr((*key, platform.machine(), os.cpu_count()))
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def measured_costs(timed_step: TimedStep, file: Path | None = None) -> CostModel:
    """The cost model of what runs `timed_step`: of `file`, where it has one that still holds, else measured."""
    kept = _read(file) if file is not None else None
    if kept is not None:
        factor = _speed_since(kept, timed_step)
        if factor is not None:
            logger.info("step costs are those of an earlier start, times %.2f", factor)
            return CostModel.of(kept.scaled(factor))
    costs = MeasuredCosts.measure(timed_step)
    if file is not None:
        _write(file, costs)
    return CostModel.of(costs)


def _speed_since(kept: MeasuredCosts, timed_step: TimedStep) -> float | None:
    """How many times as long steps take as then; None where that is not the same for all."""
    timed_step(_CHECKED_ROWS[0])  # warms up
    turns = [[timed_step(rows) for rows in _CHECKED_ROWS] for _ in range(_CHECKS)]
    now = map(min, zip(*turns, strict=True))
    changes = [math.log(seconds / kept.by_rows[rows]) for rows, seconds in zip(_CHECKED_ROWS, now, strict=True)]
    mean = sum(changes) / len(changes)
    if abs(mean) > math.log(_MAX_SPEED) or max(changes) - min(changes) > math.log(_MAX_TILT):
        return None
    return math.exp(mean)


def _read(file: Path) -> MeasuredCosts | None:
    try:
        costs = msgspec.json.decode(file.read_bytes(), type=MeasuredCosts)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        logger.warning("kept step costs cannot be read, so that steps are timed again: %s", error)
        return None
    shares = (costs.sequence_s, costs.key_s, costs.row_key_s)
    is_sound = tuple(costs.by_rows) == MEASURED_ROWS and min(costs.by_rows.values()) > 0.0 and min(shares) >= 0.0
    return costs if is_sound else None


def _write(file: Path, costs: MeasuredCosts) -> None:
    temporary: str | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent)
        with open(handle, "wb") as out:
            out.write(msgspec.json.encode(costs))
        os.replace(temporary, file)
    except OSError as error:
        logger.warning("step costs cannot be kept for the next start: %s", error)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
