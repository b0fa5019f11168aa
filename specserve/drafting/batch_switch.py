"""Whether a step drafts at all, on a device that runs by itself: one answer for all of its sequences.

Without drafts steps are queued ahead and the device never waits for the host; one sequence that drafts makes all of
them wait. What that costs no table knows, so both ways are measured, by load: the better one is kept, the other is
tried for a few steps now and then, so seldom that it takes half a percent at most, and the tokens a second of both are
compared. The first steps of a trial do not count: the first waits for the host whatever comes, and heads have no chain
before the second of a sequence. Pure arithmetic on what steps took; time is the sum of that.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

FIRST_STEPS = 16  # of a load that was not met before, until the other way is tried
TRIAL_SHARE = 0.005  # of the time, lost by trials
_GAIN = 1.01  # the other way is taken if it makes so many times the tokens a second
_NUM_UNSETTLED = {False: 2, True: 4}  # steps without and with drafts that are not counted, those of both halves
_TRIAL_STEPS = 6  # that are
_TRIAL_VERIFICATIONS = 48  # of a trial of drafts: few sequences need more steps to say what their drafts are worth
_LEAST_KNOWN = 8  # steps of the way that is kept, before a trial is compared with them
_MOST_KNOWN = 32
_LEAST_WAIT = 64  # steps between trials
_PATIENCE = 4  # times the steps of a trial, until it is given up
_STALE_S = 2.0  # a load that was away for so long is measured anew
_NEAR = 1.2  # a load is left when it is so many levels away, of which sqrt(2) times the sequences make one
_MOST_PROMPT_ROWS = 4  # for each sequence; steps with more say little of decoding
_SLOPE_WEIGHT = 0.04  # of what is expected of prompts, against what is seen


class TimedStep(NamedTuple):
    """What a step took and gave; `prompt_s` is what rows of prompts are expected to have taken of it."""

    num_seqs: int
    num_tokens: int
    num_prompt_rows: int
    prompt_s: float
    seconds: float


@dataclass(slots=True)
class Load:
    """One range of sequences at a time, whose steps can be queued ahead or not."""

    is_drafting: bool  # the way that is kept
    known: deque[TimedStep] = field(default_factory=lambda: deque(maxlen=_MOST_KNOWN))  # of it
    trial: list[TimedStep] | None = None  # of the other way, if that is being tried
    num_trial_steps: int = 0
    trial_s: float = 0.0
    num_steps: int = 0
    num_unasked: int = 0  # latest steps that would have drafted, had anybody been asked
    next_trial_s: float = 0.0
    last_s: float = 0.0

    @property
    def was_tried(self) -> bool:
        """Whether both ways were measured, or there was time enough."""
        return self.next_trial_s > 0.0 or self.num_steps > _PATIENCE * FIRST_STEPS

    @property
    def asks(self) -> bool:
        return self.is_drafting != (self.trial is not None)


class BatchSwitch:
    """On or off for whole steps, by load."""

    def __init__(self, *, pays_for_few: bool = True) -> None:
        self._pays_for_few = pays_for_few  # if at all; else rather for many
        self._loads: dict[tuple[int, bool], Load] = {}
        self._level = 0
        self._planned: Load | None = None  # of the latest step that was asked about
        self._latest: Load | None = None  # that has ended
        self._num_here = 0  # steps of that load, one after the other
        self._now_s = 0.0
        self._was_asked = True  # the latest step
        self._num_same = 0  # latest steps that were as it in that

    @property
    def is_on(self) -> bool:
        """Whether steps draft now, as far as this switch has to say."""
        return self._planned is None or self._planned.asks

    def load(self, num_seqs: int, can_run_ahead: bool) -> Load:
        """The load of a step of `num_seqs` sequences, all of which allow the next one to be queued ahead, or not."""
        at, level = 2 * math.log2(num_seqs), self._level
        if abs(at - level) > _NEAR:
            level = self._level = round(at)
        load = self._loads.get((level, can_run_ahead))
        if load is None:
            lower = [known for (other, ahead), known in self._loads.items() if other < level and ahead == can_run_ahead]
            # What does not pay for fewer sequences will not for more; or if it does, then for more as well.
            is_on = (all if self._pays_for_few else any)(known.is_drafting for known in lower)
            load = self._loads[level, can_run_ahead] = Load(is_on)
        self._planned = load
        return load

    def observe(self, load: Load, was_asked: bool, step: TimedStep, may_try: bool = True) -> bool:
        """Learn from a step of that load, in which anybody was asked for drafts or nobody.

        True if drafts are tried from now on. No trial begins unless it `may_try`.
        """
        self._now_s += step.seconds
        self._num_same = self._num_same + 1 if was_asked == self._was_asked else 1
        self._was_asked = was_asked
        if load is not self._latest:
            if self._latest is not None and self._latest.trial is not None:  # it would be one of this load, too
                self._latest.trial = None
                self._latest.next_trial_s = self._now_s + _LEAST_WAIT * step.seconds
            self._latest, self._num_here = load, 0
        self._num_here += 1
        if self._now_s - load.last_s > _STALE_S:
            load.known.clear()
        load.last_s, load.num_steps = self._now_s, load.num_steps + 1
        if load.trial is not None:
            self._try(load, load.trial, was_asked, step)
            return False
        if was_asked == load.is_drafting:
            load.num_unasked = 0
            if self._counts(step):
                load.known.append(step)
        elif load.is_drafting:
            load.num_unasked += 1
            if load.num_unasked >= FIRST_STEPS:  # all sources are switched off
                self._keep(load, False)
                load.next_trial_s = self._now_s + _LEAST_WAIT * step.seconds
        is_due = load.num_steps >= FIRST_STEPS and self._now_s >= load.next_trial_s
        if not may_try or not is_due or min(len(load.known), self._num_here) < _LEAST_KNOWN:
            return False
        load.trial, load.num_trial_steps, load.trial_s = [], 0, 0.0
        return load.asks

    def _counts(self, step: TimedStep) -> bool:
        return (
            self._num_same > _NUM_UNSETTLED[self._was_asked]
            and step.num_prompt_rows <= _MOST_PROMPT_ROWS * step.num_seqs
        )

    def _try(self, load: Load, trial: list[TimedStep], was_asked: bool, step: TimedStep) -> None:
        load.num_trial_steps, load.trial_s = load.num_trial_steps + 1, load.trial_s + step.seconds
        if was_asked == load.asks and self._counts(step):
            trial.append(step)
        least = _TRIAL_STEPS
        if load.asks:
            least = max(least, -(-_TRIAL_VERIFICATIONS // max(1, step.num_seqs)))
        if len(trial) >= least:
            gain, trial_s = _tokens_per_s(trial) / _tokens_per_s(load.known), load.trial_s
            if gain > _GAIN:
                # The next trial is of the way that was kept so far, in as many steps.
                trial_s *= statistics.median(s.seconds for s in load.known) / statistics.median(
                    s.seconds for s in trial
                )
                self._keep(load, load.asks, trial)
            lost_s = trial_s * (1.0 - min(gain, 1.0 / gain))
        elif load.num_trial_steps >= _PATIENCE * (least + _NUM_UNSETTLED[True]):
            lost_s = load.trial_s
        else:
            return
        load.trial = None
        wait_s = _LEAST_WAIT * statistics.median(s.seconds for s in load.known)
        load.next_trial_s = self._now_s + max(wait_s, lost_s / TRIAL_SHARE)

    def _keep(self, load: Load, is_drafting: bool, known: Sequence[TimedStep] = ()) -> None:
        load.is_drafting, load.num_unasked = is_drafting, 0
        load.known.clear()
        load.known.extend(known)


def _tokens_per_s(steps: Sequence[TimedStep]) -> float:
    """Of decoding. What rows of prompts took beside it is what was expected of them, corrected by how far steps with
    many of them differ from those with few: where the host is late they may take nothing."""
    expected = [step.prompt_s for step in steps]
    rest = [step.seconds - step.prompt_s for step in steps]
    middle = statistics.median(step.seconds for step in steps)
    rest = [min(seconds, 2 * middle) for seconds in rest]  # a stall is one slow step
    mean_x, mean_y = statistics.fmean(expected), statistics.fmean(rest)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(expected, rest, strict=True))
    variance = sum((x - mean_x) ** 2 for x in expected)
    slope = max(-1.0, covariance / (variance + _SLOPE_WEIGHT * middle * middle))
    decoding_s = max(0.25 * middle, mean_y - slope * mean_x)
    return statistics.fmean(step.num_tokens for step in steps) / decoding_s
