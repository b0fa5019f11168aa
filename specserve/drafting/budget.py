"""Which drafts of a step are verified: those that make its expected tokens a second the most.

A step over n sequences that verifies drafts with survivals s makes n + sum(s) tokens in the time of its rows and of
drafting. With a given number of rows the most likely drafts are the best ones, and within one sequence survival never
rises, so the best set is a prefix of all drafts in order of survival: trying every prefix finds it, whatever the shape
of the cost table. Pure functions on numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

ENTER_GAIN = 0.01  # a step after one without drafts takes none unless they gain this share


def best_prefix(
    survivals: Sequence[float], base_tokens: float, seconds: Callable[[int], float], *, enter_gain: float = 0.0
) -> int:
    """How many of `survivals` (descending) to verify; `seconds(m)` is the time of the step with m of them.

    The fewest that reach the highest rate; none unless that is more than `enter_gain` above the rate without any.
    """
    expected = base_tokens
    best, best_rate = 0, expected / seconds(0)
    least = best_rate * (1.0 + enter_gain)
    for num, survival in enumerate(survivals, 1):
        expected += survival
        rate = expected / seconds(num)
        if rate > best_rate:
            best, best_rate = num, rate
    return best if best_rate > least else 0
