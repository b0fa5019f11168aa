"""What steps cost on this machine, kept from one start to the next: timing all shapes is most of a small model's start.

Owns one file for each way to compute steps. What it says is believed where a few steps still stand to each other as
they did then, and taken with the speed that the machine has now; else everything is timed again, and kept. Each start
checks another one of them in its turn, so that what a busy machine has measured wrongly is found after a few. A file
that cannot be read or written costs its time and nothing else. No torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..cache_dirs import cache_dir
from ..kernels.native_build import cpu_name
from .cost_model import (
    MEASURED_ROWS,
    MEASURED_SHAPES,
    CostModel,
    MeasuredCosts,
    MeasuredShape,
    TimedStep,
    fastest_of,
)

logger = logging.getLogger(__name__)

# At each start: a step that weights take, and one that arithmetic takes, which another process on the cores makes more
# dear than the first one: what was measured beside it would hold drafts down. Then one of the others.
ALWAYS: tuple[MeasuredShape, ...] = ((1, 1, 0), (32, 1, 0))
_IN_TURN = tuple(shape for shape in MEASURED_SHAPES if shape not in ALWAYS)
CHECKS = 3  # of each; the fastest counts
_MAX_S = 1e6  # no step takes so long; sums of larger numbers may have no logarithm
_MAX_SPEED = 4.0  # how much faster or slower the whole machine may be; steps teach the rest
_MAX_TILT = 1.4  # and how much more that may hold for one of these steps than for another


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file holds."""

    costs: MeasuredCosts
    num_starts: int = 0  # that believed them


def costs_file(*key: object) -> Path:
    """Where the costs of what `key` says are kept; equal keys compute steps in the same way."""
    text = repr((*key, platform.machine(), cpu_name(), os.cpu_count()))
    return cache_dir("step_costs") / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def measured_costs(timed_step: TimedStep, file: Path | None = None) -> CostModel:
    """The cost model of what runs `timed_step`: of `file`, where it has one that still holds, else measured."""
    kept = _read(file) if file is not None else None
    if file is not None and kept is not None:
        turn = _IN_TURN[kept.num_starts % len(_IN_TURN)]
        factor = _speed_since(kept.costs, timed_step, (*ALWAYS, turn))
        if factor is not None:
            logger.info("step costs are those of an earlier start, times %.2f", factor)
            _write(file, _Kept(kept.costs, kept.num_starts + 1))
            return CostModel.of(kept.costs.scaled(factor))
    costs = MeasuredCosts.measure(timed_step)
    if file is not None:
        keep(file, costs)
    return CostModel.of(costs)


def keep(file: Path, costs: MeasuredCosts) -> None:
    """For the next start."""
    _write(file, _Kept(costs))


def _speed_since(kept: MeasuredCosts, timed_step: TimedStep, shapes: Sequence[MeasuredShape]) -> float | None:
    """How many times as long steps of `shapes` take as then; None where that is not the same for all."""
    timed_step(MEASURED_ROWS[0])  # warms up
    now = fastest_of(timed_step, shapes, CHECKS)
    changes = [math.log(seconds / kept.seconds(shape)) for shape, seconds in now.items()]
    mean = sum(changes) / len(changes)
    if abs(mean) > math.log(_MAX_SPEED) or has_tilted(changes):
        return None
    return math.exp(mean)


def has_tilted(changes: Sequence[float]) -> bool:
    """Whether steps no longer stand to each other as they did; logarithms of how many times as long each takes."""
    return max(changes) - min(changes) > math.log(_MAX_TILT)


def _read(file: Path) -> _Kept | None:
    try:
        kept = msgspec.json.decode(file.read_bytes(), type=_Kept)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        logger.warning("kept step costs cannot be read, so that steps are timed again: %s", error)
        return None
    costs = kept.costs
    shares, steps = (costs.sequence_s, costs.key_s, costs.row_key_s), costs.by_rows.values()
    is_sound = tuple(costs.by_rows) == MEASURED_ROWS and min(steps) > 0.0 and min(shares) >= 0.0
    return kept if is_sound and max(*steps, *shares) < _MAX_S and kept.num_starts >= 0 else None


def _write(file: Path, kept: _Kept) -> None:
    temporary: str | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent)
        with open(handle, "wb") as out:
            out.write(msgspec.json.encode(kept))
        os.replace(temporary, file)
    except OSError as error:
        logger.warning("step costs cannot be kept for the next start: %s", error)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
