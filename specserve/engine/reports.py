"""What a step gave, for those who wait for it: deltas with their texts, usage, counts, blocks for the prefix cache.

The next step needs none of it: a device that runs by itself runs that meanwhile, elsewhere it is done at once.
"""

from __future__ import annotations

import msgspec

from ..drafting.counts import Counts
from ..drafting.proposer import Proposer
from ..messages import (
    MAX_REJECTED,
    TARGET,
    Delta,
    RejectedDraft,
    RequestFailed,
    TokenLogprobs,
    TokenTrace,
)
from ..pooling_messages import Pooled
from ..schedule.block_manager import BlockManager
from ..schedule.scheduler import ScheduledSequence
from ..schedule.sequence import Sequence as TokenSequence
from ..schedule.sequence import Status
from .running import Appended, RunningRequest
from .stats import Counters

Event = Delta | Pooled | RequestFailed

_CHANCE_DIGITS = 4


class StepReport(msgspec.Struct, gc=False, eq=False):
    """What became of one sequence in a step; `events` gets its delta."""

    events: list[Event]
    state: RunningRequest
    item: ScheduledSequence
    appended: Appended
    num_drafted: int = 0  # tokens that count as drafts: none behind the end
    num_accepted: int = 0
    logprobs: list[TokenLogprobs] | None = None


class GoingOn(msgspec.Struct, gc=False, eq=False):
    """The sequences of a step that just go on by `tokens`; `events` gets their deltas."""

    events: list[Event]
    states: list[RunningRequest] = []
    items: list[ScheduledSequence] = []
    tokens: list[list[int]] = []


class Reports:
    """Of sequences that were told of and not yet written."""

    def __init__(self, counters: Counters, blocks: BlockManager, proposer: Proposer):
        self._counters, self._blocks, self._proposer = counters, blocks, proposer
        self._reports: list[StepReport | GoingOn] = []
        self._unpublished: list[TokenSequence] = []

    def add(self, report: StepReport | GoingOn) -> None:
        self._reports.append(report)

    def count_end(self, reason: str) -> None:
        """Of a sequence, whichever way it ended."""
        self._counters.finished[reason] += 1

    def add_prompt(self, item: ScheduledSequence) -> None:
        """Rows of a prompt were computed that had no token to sample."""
        if item.seq.output_len == 0:
            self._counters.prompt_tokens += item.num_rows
        self._unpublished.append(item.seq)

    def count_pooled(self, seq: TokenSequence) -> None:
        """A text was pooled; its rows were counted as they were computed."""
        self._counters.cached_prompt_tokens += seq.num_cached

    def write(self) -> None:
        """Append what is left to tell to its step's events."""
        reports, self._reports = self._reports, []
        for report in reports:
            if isinstance(report, GoingOn):
                self._write(report.events, report.states, report.items, report.tokens)
            else:
                self._write(report.events, [report.state], [report.item], [report.appended.tokens], report)
        unpublished, self._unpublished = self._unpublished, []
        for seq in unpublished:
            if seq.status is not Status.FINISHED:  # else its blocks are gone
                self.publish(seq)

    def publish(self, seq: TokenSequence) -> None:
        """Full blocks of what is computed are there for others from now on, if such as this one read them."""
        if seq.pooling is not None and seq.needs_every_row:
            return
        self._blocks.commit(
            seq.block_table, seq.block_keys, seq.root_key, seq.tokens, seq.num_computed, seq.prompt_keys
        )

    def _write(
        self,
        events: list[Event],
        states: list[RunningRequest],
        items: list[ScheduledSequence],
        tokens_of: list[list[int]],
        report: StepReport | None = None,
    ) -> None:
        """Of sequences that just go on by their tokens, or of one of which a `report` says more."""
        size, price = self._blocks.block_size, self._proposer.row_price
        drafted: list[str] = []
        accepted: list[str] = []
        counts: Counts | None = None
        for state, item, tokens in zip(states, items, tokens_of, strict=True):
            seq, sources, num_accepted = state.seq, item.draft_sources, len(tokens) - 1
            if report is not None:  # none behind the end
                sources, num_accepted = sources[: report.num_drafted], report.num_accepted
            if state.drafts.counts is not counts:  # the next adapter's
                counts = state.drafts.counts
                counts.add_price(price)
            counts.add(len(sources), num_accepted, len(tokens))
            if sources:
                right = sources[:num_accepted]
                self._counters.lengths.add(len(sources), num_accepted)
                seq.count_drafts(sources, right)
                drafted += sources
                accepted += right
            seq.num_forwards += 1
            if report is not None or seq.num_forwards == 1:
                told = report or StepReport(events, state, item, Appended(tokens))
                events.append(self._whole_delta(told))
            else:
                text = "" if state.detokenizer is None else state.text_of(Appended(tokens))
                events.append(Delta(seq.request_id, tokens, text))
            if (len(seq.block_keys) + 1) * size <= seq.num_computed:
                self._unpublished.append(seq)
        self._counters.generated_tokens += sum(map(len, tokens_of))
        self._counters.drafted_by_source.update(drafted)
        self._counters.accepted_by_source.update(accepted)

    def _whole_delta(self, report: StepReport) -> Delta:
        """With what most have not beside tokens and text."""
        state, appended, logprobs = report.state, report.appended, report.logprobs
        seq, num_tokens, finish = state.seq, len(appended.tokens), appended.finish_reason
        is_first = seq.num_forwards == 1
        if is_first:
            self._counters.prompt_tokens += report.item.num_rows
            self._counters.cached_prompt_tokens += seq.num_cached
        if finish is not None:
            self.count_end(finish)
        return Delta(
            seq.request_id,
            appended.tokens,
            state.text_of(appended),
            appended.num_silent,
            logprobs=logprobs[:num_tokens] if logprobs is not None and num_tokens else None,
            trace=_trace_of(report) if seq.is_traced else None,
            prompt_logprobs=state.prompt_logprobs if is_first else None,
            finish_reason=finish,
            stop_reason=appended.stop_reason,
            usage=seq.usage() if finish is not None else None,
        )


def _trace_of(report: StepReport) -> list[TokenTrace]:
    """Where each token of a step's came from, of the drafts that count."""
    item, tokens, num_right = report.item, report.appended.tokens, report.num_accepted
    forward, num = report.state.seq.num_forwards - 1, report.num_drafted
    chances = [round(chance, _CHANCE_DIGITS) for chance in item.draft_chances[:num]]
    drafts = [*zip(item.drafts[:num], item.draft_sources[:num], chances, strict=True)]
    trace = [TokenTrace(token, "", source, chance, forward) for token, source, chance in drafts[:num_right]]
    rejected = [RejectedDraft(token, "", source, chance) for token, source, chance in drafts[num_right:]]
    trace += [TokenTrace(token, "", TARGET, None, forward, rejected[:MAX_REJECTED]) for token in tokens[num_right:]]
    return trace
