"""Which way whole steps go on a device that runs by itself: with drafts or none, of all sequences or of half of them.

One answer for all sequences, by load. What a way costs no table knows: without drafts steps are queued ahead and the
device never waits for the host; one sequence that drafts, or needs its tokens for its next row, makes all of them wait,
unless two halves take turns; halves pay twice for what every step costs. So ways are measured (`way_trial.py`): the
best one is kept, each other is tried for a few steps now and then, so seldom that it takes half a percent at most. The
first steps of a way do not count: the first waits for the host whatever comes, and heads have no chain before the
second of a sequence. Time is the sum of what steps took.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from .way_trial import TimedStep, Trial, Way

BARE = Way(drafts=False, halves=False)  # queued ahead, where nobody needs his tokens first
WHOLE = Way(drafts=True, halves=False)
HALVES = Way(drafts=True, halves=True)

FIRST_STEPS = 16  # until another way is tried at all
TRIAL_SHARE = 0.005  # of the time, lost by trials of one way
_MOST_TRYING = 0.1  # of the time, in ways that are tried
_GAIN = 1.01  # another way is taken if it makes so many times the tokens a second
_TRIAL_STEPS = 6  # that count
_TRIAL_VERIFICATIONS = 48  # of drafts: few sequences need more steps to say what their drafts are worth
_LEAST_KNOWN = 8  # steps of the way that is kept, before a trial
_MOST_KNOWN = 32
_LEAST_WAIT = 64  # steps between trials of a way
_PATIENCE = 4  # times the steps of a trial, until it is given up
_NEAR = 1.2  # a load is left when it is so many levels away, of which sqrt(2) times the sequences make one
_ALIKE = 2  # levels up to which steps are compared, and a trial goes on
_MOST_PROMPTS = 0.75  # of a step's time, expected; steps of more say little of decoding
_FEWEST_HALVED = 4  # sequences
_BACKLOG_STEPS = 3  # one after the other with a backlog of prompts or without, until it counts


class Kind(NamedTuple):
    """Loads of one kind differ in their sequences' number alone."""

    choices: tuple[Way, ...]  # the first is where it begins
    can_run_ahead: bool  # nobody's next row needs his tokens
    has_backlog: bool  # prompts fill what a step has for them


@dataclass(slots=True)
class Load:
    """One range of sequences at a time, of one kind."""

    kind: Kind
    level: int
    kept: Way
    trial: Trial | None = None
    num_unasked: int = 0  # latest steps that would have drafted, had anybody been asked
    next_trials: dict[Way, float] = field(default_factory=dict)  # when, by way that was tried
    is_measured: bool = False  # some trial came to its end

    @property
    def way(self) -> Way:
        """Of the next step."""
        return self.kept if self.trial is None or self.trial.is_over else self.trial.way

    @property
    def is_known(self) -> bool:
        """Whether all other ways were tried."""
        return all(way in self.next_trials for way in self.kind.choices if way != self.kept)

    def is_like(self, kind: Kind, level: int) -> bool:
        """Whether its steps may be compared with those of that load."""
        mine = self.kind
        if mine.choices != kind.choices or mine.can_run_ahead != kind.can_run_ahead:
            return False
        return abs(self.level - level) <= _ALIKE


@dataclass(slots=True)
class Live:
    """The sequences that are there."""

    num_drafting: int = 0  # that may draft
    num_fixed: int = 0  # of these, whatever it costs
    num_held_up: int = 0  # that need their tokens before the next step is queued

    def choices(self, num_seqs: int) -> tuple[Way, ...]:
        """What their steps may be; with a single one there is nothing to learn."""
        can_halve, choices = num_seqs >= _FEWEST_HALVED, []
        if self.num_drafting:
            choices = [WHOLE, HALVES] if can_halve else [WHOLE]
        if not self.num_fixed:
            choices.append(BARE)
        return tuple(choices)


class StepWays:
    """The way that is kept, and trials of others, by load."""

    def __init__(self) -> None:
        self._loads: dict[tuple[Kind, int], Load] = {}
        self._level = 0
        self._planned: Load | None = None  # of the latest step that was asked about
        self._latest: Load | None = None  # that has ended
        self._trying: Load | None = None  # whose trial it is
        self._now_s = self._next_trial_s = 0.0
        self._num_steps = 0
        self._latest_way: Way | None = None
        self._num_same = self._num_unsettled = 0  # latest steps of that way; the first of these do not count
        self._known: deque[TimedStep] = deque(maxlen=_MOST_KNOWN)  # of these, those that count
        self._has_backlog, self._num_otherwise = False, 0  # latest steps that say that this has changed

    @property
    def latest(self) -> Way | None:
        """Of the latest step that was asked about, if any was."""
        return None if self._planned is None else self._planned.way

    def plan(self, num_seqs: int, live: Live) -> Load | None:
        """The load of the next step while `num_seqs` sequences run; None where there is no choice.

        As long as something is tried, and little else changes, the load that it is tried for; else the trial ends.
        """
        choices = live.choices(num_seqs)
        if len(choices) < 2:
            return None
        kind = Kind(choices, not live.num_held_up, self._has_backlog)
        at, level = 2 * math.log2(max(1, num_seqs)), self._level
        if abs(at - level) > _NEAR:
            level = self._level = round(at)
        if self._trying is not None:
            if self._trying.is_like(kind, level):
                return self._trying
            self._end_trial(self._trying)
        load = self._loads.get((kind, level))
        if load is None:
            load = self._loads[kind, level] = Load(kind, level, choices[0])
        if load is not self._planned and not load.is_measured:
            load.kept = self._guess(kind, level)
        self._planned = load
        return load

    def note_prompts(self, is_full: bool) -> None:
        """Whether prompts fill what a step has for them, of the step that is planned."""
        self._num_otherwise = self._num_otherwise + 1 if is_full != self._has_backlog else 0
        if self._num_otherwise >= _BACKLOG_STEPS:
            self._has_backlog, self._num_otherwise = is_full, 0

    def _guess(self, kind: Kind, level: int) -> Way:
        """What was measured of the load that is nearest; of those of more sequences only if it is near.

        What pays for many may not for few, where the host's part is small.
        """
        measured = [
            (other.has_backlog != kind.has_backlog, abs(at - level), at, load.kept)
            for (other, at), load in self._loads.items()
            if load.is_measured and other.choices == kind.choices and other.can_run_ahead == kind.can_run_ahead
            if at <= level + _ALIKE
        ]
        return min(measured)[-1] if measured else kind.choices[0]

    def observe(self, load: Load, way: Way, step: TimedStep) -> bool:
        """Learn from a step of that load, which went that way.

        True if drafts are tried from now on, where none are made.
        """
        self._now_s += step.seconds
        self._num_steps += 1
        counts = self._note(load, way, step)
        if load.trial is not None:
            self._try(load, load.trial, step, counts and way == load.way)
            return False
        if way == load.kept:
            load.num_unasked = 0
        elif load.kept.drafts and not way.drafts:
            load.num_unasked += 1
            if load.num_unasked >= FIRST_STEPS and BARE in load.kind.choices:  # all sources are switched off
                load.next_trials[load.kept] = self._now_s + _LEAST_WAIT * step.seconds
                load.kept, load.num_unasked = BARE, 0
        return way == load.kept and self._trying is None and self._begin_trial(load)

    def _note(self, load: Load, way: Way, step: TimedStep) -> bool:
        """Count the step in; whether it says what steps of its way take."""
        latest, self._latest = self._latest, load
        if way != self._latest_way:
            before = self._latest_way
            self._num_unsettled = 4 if way.drafts and not (before and before.drafts) else 2
            self._latest_way, self._num_same = way, 0
            self._known.clear()
        elif latest is not None and not latest.is_like(load.kind, load.level):
            self._known.clear()
        self._num_same += 1
        counts = self._num_same > self._num_unsettled and step.prompt_s <= _MOST_PROMPTS * step.seconds
        if counts:
            self._known.append(step)
        return counts

    def _begin_trial(self, load: Load) -> bool:
        num_known = max(_LEAST_KNOWN, min(_least(load.kept, self._known), _MOST_KNOWN))
        if self._num_steps < FIRST_STEPS or len(self._known) < num_known:
            return False
        if self._now_s < self._next_trial_s and any(
            other.is_known and other.is_like(load.kind, load.level) for other in self._loads.values()
        ):
            return False
        due = {way: load.next_trials.get(way, 0.0) for way in load.kind.choices if way != load.kept}
        way = min(due, key=lambda way: due[way])
        if due[way] > self._now_s:
            return False
        load.trial, self._trying = Trial(way, [*self._known][-num_known:]), load
        return way.drafts and not load.kept.drafts

    def _try(self, load: Load, trial: Trial, step: TimedStep, counts: bool) -> None:
        trial.add(step, counts)
        least = _least(load.way, trial.before)
        if len(trial.after if trial.is_over else trial.steps) >= least:
            if trial.is_over:
                self._judge(load, trial)
            else:
                trial.end_part()
        elif trial.num_steps >= _PATIENCE * (least + 4):
            self._end_trial(load)

    def _judge(self, load: Load, trial: Trial) -> None:
        gain, loser, lost_s = trial.gain(), trial.way, 0.0
        load.is_measured = True
        if gain > _GAIN + trial.doubt():
            loser, load.kept = load.kept, trial.way  # the loser is tried again soon: a wrong verdict shall not last
        else:
            lost_s = trial.seconds * (1.0 - min(gain, 1.0 / gain))
        self._end_trial(load, loser, lost_s)

    def _end_trial(self, load: Load, loser: Way | None = None, lost_s: float = 0.0) -> None:
        """Wait before `loser` is tried again, since that would cost so much; None: nothing was learned."""
        trial = load.trial
        assert trial is not None
        wait_s = max(_LEAST_WAIT * statistics.median(step.seconds for step in trial.before), lost_s / TRIAL_SHARE)
        for shift in (-1, 0, 1) if loser is not None else (0,):  # neighbours are hardly different
            other = self._loads.get((load.kind, load.level + shift))
            if other is not None and other.kept == load.kept:
                way = loser if loser is not None else trial.way
                other.next_trials[way] = max(other.next_trials.get(way, 0.0), self._now_s + wait_s)
        self._next_trial_s = self._now_s + trial.seconds / _MOST_TRYING
        load.trial = self._trying = None


def _least(way: Way, known: deque[TimedStep] | list[TimedStep]) -> int:
    """Steps of a way that are enough to judge it by, where `known` are others of the load."""
    if not way.drafts or not known:
        return _TRIAL_STEPS
    return max(_TRIAL_STEPS, -(-_TRIAL_VERIFICATIONS // max(1, known[-1].num_seqs)))
