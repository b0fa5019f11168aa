"""From pairwise outcomes to ratings: Bradley-Terry on the scale of Elo, with intervals by the bootstrap.

"Rank analysis of incomplete block designs" (Bradley and Terry 1952), fitted by Newton's method: minorisation (Hunter
2004) needs thousands of steps where a model nearly always wins. A tie is half a win for both. Every pair that met gets
half a win for each side beside what happened, so that a model which always wins has a rating at all. What is drawn anew
for the intervals are rows, with all pairs that met there: outcomes of one row are not independent. Only differences
mean something: the mean of the field is 1000, and 400 more are odds of ten to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_PRIOR = 0.5
_STEPS = 100
_LONGEST_STEP = 2.0  # in natural logarithms of odds: far from the optimum a whole step may miss it
_TOLERANCE = 1e-6
_RIDGE = 1e-9  # of the curvature: groups of models that never met have no odds between them, and each its own mean
NUM_DRAWS = 500


@dataclass(frozen=True, slots=True)
class Rating:
    """`low` and `high` hold 95% of the draws; `rank` counts models that are certainly better.

    Models of two groups have not met, not even over others: nothing of these numbers says anything between them.
    """

    rating: float
    low: float
    high: float
    rank: int
    num_rows: int
    group: int  # from 0


def ratings_of(rows: Sequence[np.ndarray], seed: int = 0) -> list[Rating | None]:
    """Of wins by row: `rows[i][a, b]` is how often model a won over b at row i, [M, M]. None for who met nobody."""
    wins = np.stack(rows) if rows else np.zeros((0, 0, 0))  # [R, M, M]
    if not wins.size:
        return [None] * wins.shape[1]
    present = np.flatnonzero((wins + wins.transpose(0, 2, 1)).any(axis=(0, 2)))
    found: list[Rating | None] = [None] * wins.shape[1]
    if present.size:
        for place, rating in zip(present, _ratings(wins[:, present][:, :, present], seed), strict=True):
            found[place] = rating
    return found


def _ratings(wins: np.ndarray, seed: int) -> list[Rating]:
    """Of models that have all met somebody."""
    num_rows, num_models = wins.shape[:2]
    met = (wins + wins.transpose(0, 2, 1)).any(axis=0)
    point = _fitted(wins.sum(axis=0)[None], met)[0]
    draws = np.random.default_rng(seed).multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=NUM_DRAWS)
    drawn = (draws.astype(float) @ wins.reshape(num_rows, -1)).reshape(-1, num_models, num_models)
    low, high = np.percentile(_fitted(drawn, met), [2.5, 97.5], axis=0)
    counts = (wins + wins.transpose(0, 2, 1)).any(axis=2).sum(axis=0)
    groups = _groups(met)
    return [
        Rating(
            rating=float(point[model]),
            low=float(low[model]),
            high=float(high[model]),
            rank=1 + int(((low > high[model]) & (groups == groups[model])).sum()),
            num_rows=int(counts[model]),
            group=int(groups[model]),
        )
        for model in range(num_models)
    ]


def _groups(met: np.ndarray) -> np.ndarray:
    """Of each model [M] the number of its group: who is reached from it over who met whom, `met` [M, M]."""
    reached = met | np.eye(len(met), dtype=bool)
    while (further := reached @ reached).sum() > reached.sum():
        reached = further
    return np.unique(reached.argmax(axis=1), return_inverse=True)[1]


def _fitted(wins: np.ndarray, met: np.ndarray) -> np.ndarray:
    """Ratings [D, M] of wins [D, M, M], with the prior where models have met."""
    wins = wins + _PRIOR * met
    games = wins + wins.transpose(0, 2, 1)
    won = wins.sum(axis=2)  # [D, M]
    strength = np.zeros_like(won)  # logarithms
    diagonal = np.eye(won.shape[1])
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(strength[:, None, :] - strength[:, :, None]))  # [D, M, M] that a wins over b
        slope = won - (games * chance).sum(axis=2)
        spread = games * chance * (1 - chance)
        own = spread.sum(axis=2) + _RIDGE * spread.sum(axis=(1, 2))[:, None]
        step = np.linalg.solve(diagonal * own[:, :, None] - spread, slope[:, :, None])[:, :, 0]
        strength += np.clip(step, -_LONGEST_STEP, _LONGEST_STEP)
        strength -= strength.mean(axis=1, keepdims=True)
        if np.abs(step).max() < _TOLERANCE:
            break
    return 1000 + 400 * strength / np.log(10)
