"""Successive halving (Jamieson and Talwalkar 2016): all runs for a share of their steps, the best of them for more.

Pure functions of results: which runs go on follows from what is on the disk, so a sweep that was interrupted decides as
one that was not. Each run has the learning rates of its whole length from the start; one that goes on is the run that
it would have been alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .results import RungResult

_MOST_RUNGS = 3


def default_rungs(num_points: int, factor: int) -> int:
    """As many as leave a run for the last one, three at most."""
    return min(_MOST_RUNGS, 1 + int(math.log(num_points, factor) + 1e-9))


def share_of(rung: int, num_rungs: int, factor: int) -> float:
    """Of a run's steps, taken by the end of `rung`, counted from 0; the last one has all."""
    return float(factor) ** (rung + 1 - num_rungs)


def order_of(results: Mapping[str, RungResult]) -> list[str]:
    """Names from the best run to the worst: healthy ones, those that forget, then the collapsed; equals by name."""

    def rank(name: str) -> tuple[int, float, float, str]:
        result = results[name]
        state = 2 if result.has_collapsed else int(bool(result.marks))
        loss = math.inf if result.loss is None else result.loss
        return state, -(result.score if result.score is not None else -math.inf), loss, name

    return sorted(results, key=rank)


def healthy(results: Mapping[str, RungResult]) -> list[str]:
    """The same order, without those that have collapsed."""
    return [name for name in order_of(results) if not results[name].has_collapsed]


def best_of(finished: Mapping[str, RungResult]) -> str | None:
    """The best run that reached the last rung; None if all of these collapsed."""
    return next(iter(healthy(finished)), None)
