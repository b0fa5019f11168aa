"""A trial of one way for whole steps between steps of another, and what a way makes a second.

Loads change while they are measured: sequences join and leave, prompts come in bursts, contexts grow. So a trial is
compared with the steps right before it and right after it, and what rows of prompts took is taken off all of them. Pure
arithmetic on what steps took.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_SLOPE_WEIGHT = 0.04  # of what is expected of prompts, against what is seen


class Way(NamedTuple):
    """How whole steps go on a device that runs by itself."""

    drafts: bool  # sequences are asked for drafts; else a step may be queued before the last one's tokens are known
    halves: bool  # of the sequences, in turns: while one half's step runs, the host sees to the other's


class TimedStep(NamedTuple):
    """What a step took and gave; `prompt_s` is what rows of prompts are expected to have taken of it."""

    num_seqs: int
    num_tokens: int
    prompt_s: float
    seconds: float


@dataclass(slots=True)
class Trial:
    """Steps of another way, between some of the way that is kept; of both those that count."""

    way: Way
    before: list[TimedStep]
    steps: list[TimedStep] = field(default_factory=list)
    after: list[TimedStep] = field(default_factory=list)
    seconds: float = 0.0  # of the other way, all steps
    is_over: bool = False  # the other way; what is left is `after`
    num_steps: int = 0  # all, of the part that lasts

    def add(self, step: TimedStep, counts: bool) -> None:
        self.num_steps += 1
        if not self.is_over:
            self.seconds += step.seconds
        if counts:
            (self.after if self.is_over else self.steps).append(step)

    def end_part(self) -> None:
        """From now on steps go the way that is kept again."""
        self.is_over, self.num_steps = True, 0

    def gain(self) -> float:
        """How many times the tokens a second of the way that is kept."""
        kept = [1.0 / tokens_per_s(steps) for steps in (self.before, self.after)]
        return tokens_per_s(self.steps) * statistics.fmean(kept)

    def doubt(self) -> float:
        """One standard error of the gain, as a share of it: steps of one way differ, most of all beside other work."""
        kept = math.hypot(_spread(self.before), _spread(self.after)) / 2
        return math.hypot(_spread(self.steps), kept)


def _spread(steps: Sequence[TimedStep]) -> float:
    """One standard error of the tokens a second of `steps`, as a share."""
    decoding = [step.seconds - step.prompt_s for step in steps]
    rate = sum(step.num_tokens for step in steps) / sum(decoding)
    off = [step.num_tokens - rate * seconds for step, seconds in zip(steps, decoding, strict=True)]
    return statistics.pstdev(off) / statistics.fmean(step.num_tokens for step in steps) / math.sqrt(len(steps) - 1)


def tokens_per_s(steps: Sequence[TimedStep]) -> float:
    """Of decoding, from two steps or more. Stalls are nobody's fault: the step that took longest for what it gave is
    left out, and one that took twice as long as most counts as that.

    What rows of prompts took beside it is what was expected of them, corrected by how far steps with many of them
    differ from those with few: where the host is late they may take nothing.
    """
    steps = sorted(steps, key=lambda step: (step.seconds - step.prompt_s) / step.num_tokens)[:-1]
    expected = [step.prompt_s for step in steps]
    rest = [step.seconds - step.prompt_s for step in steps]
    middle = statistics.median(step.seconds for step in steps)
    rest = [min(seconds, 2 * middle) for seconds in rest]
    mean_x, mean_y = statistics.fmean(expected), statistics.fmean(rest)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(expected, rest, strict=True))
    variance = sum((x - mean_x) ** 2 for x in expected)
    slope = max(-1.0, covariance / (variance + _SLOPE_WEIGHT * middle * middle))
    decoding_s = max(0.25 * middle, mean_y - slope * mean_x)
    return statistics.fmean(step.num_tokens for step in steps) / decoding_s
