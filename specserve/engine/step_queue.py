"""From the sequences that wait to a step that the device was told of: scheduled, drafted, and its forward queued.

Which sequences a step has, and whether one may be queued before the tokens of the last are known, is decided here. What
comes of a step is `commits`' matter; where a forward raises, each of its sequences runs alone and is committed at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from ..adapters.lora import LoraAdapter
from ..compute.interrupt import StepInterruptedError
from ..compute.path import ComputePath
from ..drafting.proposer import Proposer
from ..schedule.scheduler import ScheduledSequence, Scheduler
from .commits import Commits
from .queued_step import QueuedStep
from .reports import Reports
from .stats import Counters

logger = logging.getLogger(__name__)


class StepQueue:
    """Of one engine; `adapters` are those that it holds now, `clock` is the path's."""

    def __init__(
        self,
        scheduler: Scheduler,
        proposer: Proposer,
        path: ComputePath,
        adapters: Mapping[str, LoraAdapter],
        commits: Commits,
        reports: Reports,
        counters: Counters,
        clock: Callable[[], float],
    ):
        self._scheduler, self._proposer, self._path, self._adapters = scheduler, proposer, path, adapters
        self._commits, self._reports, self._counters, self._clock = commits, reports, counters, clock
        self.runner, self._sampler = path.runner, path.sampler
        self.num_rows = 0  # of the step that runs, or of the one behind it if that has more; without drafts

    def queue(self, is_ahead: bool = False, beside: QueuedStep | None = None) -> QueuedStep | None:
        """Schedule, draft and queue a step; None if there is nothing to do, or it was ended for a request.

        If its forward raises, each sequence runs alone, so that only the guilty one fails; not `is_ahead` of tokens
        that are still unknown, but when they are known. A step `beside` another is of other sequences.
        """
        scheduler = self._scheduler
        in_flight = {item.seq for item in beside.items} if beside is not None else ()
        is_half = beside is not None or (not is_ahead and self._proposer.in_halves(len(scheduler.running)))
        items = scheduler.schedule(in_flight, half=is_half)
        if not items:
            return None
        num_rows, adapters = sum([item.num_rows for item in items]), self._adapters
        self.num_rows = max(num_rows, self.num_rows) if is_ahead else num_rows
        keys = {item.seq.adapter_hash for item in items}
        held = [adapters[key] for key in keys if key is not None]
        step = QueuedStep(items, self._clock(), num_rows, held, is_ahead=is_ahead)
        drafts = (item.seq.owner.drafts for item in items)
        is_blind = is_ahead and beside is None
        step.proposed = self._proposer.propose(items, drafts, scheduler, is_blind, is_half)
        self._path.interrupt.is_heeded = all([item.seq.is_background for item in items])
        try:
            step.output = self.runner.forward(items, adapters)
        except StepInterruptedError:
            return None
        except Exception:
            if is_ahead:
                logger.exception("a step of %d sequences failed before the last one's tokens were known", len(items))
                return None
            logger.exception("a step of %d sequences failed; running them one by one", len(items))
            for item in items:
                self._run_alone(item, step)
        else:
            step.launched_at = self._clock()
            step.pending = self._sampler.launch(step.output.logits, step.output.groups)
        self._counters.num_steps += 1
        return step

    def queue_behind(self, step: QueuedStep) -> QueuedStep | None:
        """The step behind `step`, where that needs none of its tokens: of the same sequences, or of other ones."""
        max_rows = self._path.max_rows_ahead
        if step.can_be_passed(max_rows):
            drafts = (owner.drafts for item in step.items if (owner := item.seq.owner) is not None)
            if not self._proposer.would_ask(len(self._scheduler.running), drafts):
                step.pass_by(self._reports)
                return self.queue(is_ahead=True)
        if self._proposer.in_halves(len(self._scheduler.running)) and step.has_room_beside(max_rows):
            return self.queue(is_ahead=True, beside=step)
        return None

    def _run_alone(self, item: ScheduledSequence, step: QueuedStep) -> None:
        self._path.interrupt.is_heeded = False
        try:
            output = self.runner.forward([item], self._adapters)
        except Exception as error:
            logger.exception("request %s fails alone", item.seq.request_id)
            self._commits.fail(
                item.seq, f"the model failed on this request: {type(error).__name__}: {error}", step.events
            )
        else:
            kept = self._sampler.collect(self._sampler.launch(output.logits, output.groups))
            alone = QueuedStep([item], step.queued_at, item.num_rows, [], step.events, step.verified)
            self._commits.commit(alone, output, kept)
            step.num_tokens += alone.num_tokens
