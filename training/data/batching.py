"""Which examples make up which step: batches of similar lengths, decided by the seed alone.

The plan of a whole run is a function of lengths, settings and seed, so a resumed run needs only the number of its step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

_MOST_EPOCHS = 10.0  # by default: more would only learn a handful of rows by heart
_POOL = 24  # batches whose examples are sorted by length together: little padding, still a random order


def plan_epoch(lengths: Sequence[int], batch_tokens: int, seed: int, least_rows: int = 1) -> list[list[int]]:
    """Indices of the examples of each step of one epoch; a batch's rows x longest row is at most `batch_tokens`.

    One of fewer than `least_rows` examples joins the batch before it, if there is one, whatever its tokens.
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    mean = sum(lengths) / len(lengths)
    pool_len = max(1, int(_POOL * batch_tokens / mean))
    batches: list[list[int]] = []
    for start in range(0, len(order), pool_len):
        pool = sorted(order[start : start + pool_len], key=lambda idx: lengths[idx])
        batch: list[int] = []
        for idx in pool:
            if batch and (len(batch) + 1) * lengths[idx] > batch_tokens:
                batches.append(batch)
                batch = []
            batch.append(idx)
        batches.append(batch)
    for idx in range(len(batches) - 1, 0, -1):
        if len(batches[idx]) < least_rows:
            batches[idx - 1] += batches.pop(idx)
    if len(batches) > 1 and len(batches[0]) < least_rows:
        batches[1] += batches.pop(0)
    rng.shuffle(batches)
    return batches


def plan_run(
    lengths: Sequence[int],
    batch_tokens: int,
    seed: int,
    epochs: float,
    max_steps: int | None,
    least_rows: int = 1,
) -> list[list[int]]:
    """Every step of a run; a fraction of an epoch is cut from its end."""
    steps: list[list[int]] = []
    epoch = 0
    while epoch < epochs:
        batches = plan_epoch(lengths, batch_tokens, seed * 1000 + epoch, least_rows)
        share = min(1.0, epochs - epoch)
        steps += batches[: max(1, round(len(batches) * share))]
        epoch += 1
    return steps[:max_steps]


def epoch_starts(plan: Sequence[Sequence[int]]) -> list[int]:
    """The steps with which the epochs of a plan begin: where rows come again."""
    starts, seen = [], set[int]()
    for step, batch in enumerate(plan):
        if not step or not seen.isdisjoint(batch):
            starts.append(step)
            seen = set()
        seen.update(batch)
    return starts


def default_epochs(lengths: Sequence[int], batch_tokens: int, seed: int, min_steps: int, min_rows: int) -> float:
    """One, or as many (not whole) as few rows need for `min_steps` steps over `min_rows` rows, within reason."""
    num_steps = len(plan_epoch(lengths, batch_tokens, seed * 1000))
    return min(_MOST_EPOCHS, max(1.0, min_steps / num_steps, min_rows / len(lengths)))
