"""What a step's tokens do to its sequences: they go on, end or fail.

No more is done here than the next step needs; all else waits in `reports` until that one runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from ..compute.sampler import token_logprobs
from ..compute.step_output import StepOutput
from ..drafting.proposer import Proposer
from ..errors import ErrorInfo
from ..messages import RequestFailed, TokenLogprobs
from ..schedule.row_group import RowGroup
from ..schedule.scheduler import ScheduledSequence
from ..schedule.sequence import Sequence, Status
from .pooling import PooledAnswers
from .queued_step import QueuedStep
from .reports import Event, GoingOn, Reports, StepReport
from .running import RunningRequest


class Commits:
    """Of steps whose tokens are known; `remove` lets go of a request that has ended, `pooled` ends pooled texts."""

    def __init__(
        self, proposer: Proposer, reports: Reports, remove: Callable[[RunningRequest], None], pooled: PooledAnswers
    ):
        self._proposer, self._reports, self._remove = proposer, reports, remove
        self._pooled = pooled

    def commit(self, step: QueuedStep, output: StepOutput, kept: list[list[int]]) -> None:
        """All that came of a step; no more of it than the next step needs."""
        self._score_prompts(output)
        self._go_on(step, output, kept)
        if output.pooled is not None:
            self._pooled.commit(output.pooled, step.events)

    def _score_prompts(self, output: StepOutput) -> None:
        """Note log-probabilities of prompts, whose rows are computed and not yet counted."""
        for item, first_row, num_rows in output.prompt_rows:
            seq = item.seq
            scores = seq.owner.prompt_logprobs if seq.owner is not None else None  # else aborted meanwhile
            if scores is None:
                continue
            num_scored = max(0, len(scores) - 1 - seq.num_computed)  # of these rows, before a preemption
            tokens = seq.tokens[seq.num_computed + 1 + num_scored : seq.num_computed + 1 + num_rows]
            rows = range(first_row + num_scored, first_row + num_rows)
            if rows:
                scores += token_logprobs(output.logits, rows, tokens, seq.sampling.prompt_logprobs or 0)

    def _go_on(self, step: QueuedStep, output: StepOutput, kept: list[list[int]]) -> None:
        """Append what was sampled; `reports` tells those who wait."""
        if len(output.items) < len(step.items) and not step.is_passed:
            step.go_on_with_prompts(self._reports)
        logprobs: dict[int, list[TokenLogprobs]] | None = None  # of those that ask, once one does
        going_on, is_passed = GoingOn(step.events), step.is_passed
        states, items, going = going_on.states, going_on.items, going_on.tokens
        for item, group, tokens in zip(output.items, output.groups, kept, strict=True):
            seq = item.seq
            state = seq.owner
            if state is None:  # finished since this step was queued
                continue
            so_far = seq.tokens
            if is_passed:
                so_far.pop()  # it was not known yet
            num_tokens = len(so_far) + len(tokens)
            if state.is_plain and tokens and num_tokens < seq.max_len and state.ends.isdisjoint(tokens):
                so_far += tokens
                if not is_passed:
                    seq.num_computed = num_tokens - 1
                states.append(state)
                items.append(item)
                going.append(tokens)
                continue
            if seq.grammar is not None and tokens:
                tokens = tokens[: seq.grammar.commit(tokens)]
            if not tokens:
                self._fail_without_token(group, step.events)
                continue
            report = self._append(step, item, tokens)
            step.num_tokens += len(report.appended.tokens)
            self._reports.add(report)
            if seq.status is not Status.FINISHED and (head := state.drafts.head) is not None:
                tapped, row = output.taps[head.head.config.tap_layer], group.first_row + len(tokens) - 1
                head.set_hidden(output.hidden, tapped, row, len(seq.tokens))
            if seq.sampling.logprobs is not None:
                if logprobs is None:
                    logprobs = _logprobs_of(output, kept)
                report.logprobs = logprobs.get(id(seq))
        self._reports.add(going_on)
        step.num_tokens += sum(map(len, going))
        if step.proposed is not None and step.proposed.num_asked:
            for state, item, tokens in zip(states, items, going, strict=True):
                if state.drafts.item is item:  # it was asked
                    step.verified.add(state.drafts, len(item.drafts), len(tokens) - 1, tokens)

    def _append(self, step: QueuedStep, item: ScheduledSequence, tokens: list[int]) -> StepReport:
        """Append tokens to a sequence, which goes on or leaves."""
        seq, state = item.seq, item.seq.owner
        num_drafted, num_accepted = len(item.drafts), len(tokens) - 1
        appended = state.append(tokens)
        if not step.is_passed:
            num_new = min(num_accepted, len(appended.tokens))
            seq.num_computed = min(len(seq.tokens), seq.num_computed + item.num_rows + num_new)
        if num_accepted < num_drafted and item.drafts[num_accepted] == tokens[-1]:
            num_accepted += 1  # the last one was right too, and the grammar lets nothing follow
        if appended.finish_reason is not None:
            num_kept = len(appended.tokens)
            num_drafted, num_accepted = min(num_drafted, num_kept), min(num_accepted, num_kept)
            self._reports.publish(seq)
            self._proposer.sources.learn(seq.request, seq.output_ids)  # while its adapter is sure to be there
            self._remove(state)
        if state.drafts.item is item:  # it was asked
            step.verified.add(state.drafts, len(item.drafts), num_accepted, appended.tokens)
        return StepReport(step.events, state, item, appended, num_drafted, num_accepted)

    def fail(self, seq: Sequence, message: str, events: list[Event]) -> None:
        """End a sequence by the model's own fault."""
        self._remove(seq.owner)
        self._reports.count_end("error")
        events.append(RequestFailed(seq.request_id, ErrorInfo(message, 500, "server_error", None, "model_failure")))

    def _fail_without_token(self, group: RowGroup, events: list[Event]) -> None:
        seq = group.seq
        if group.failure == "nan":
            self.fail(seq, "the model produced NaN for this request; its adapter or the dtype is unfit", events)
            return
        reason = seq.grammar.problem or seq.grammar.error if seq.grammar is not None else ""
        message = f"the grammar allows no token after {seq.output_len} tokens of output{reason and ': '}{reason}"
        self._remove(seq.owner)
        self._reports.count_end("error")
        events.append(RequestFailed(seq.request_id, ErrorInfo(message, code="grammar_dead_end")))


def _logprobs_of(output: StepOutput, kept: list[list[int]]) -> dict[int, list[TokenLogprobs]]:
    """Log-probabilities of the tokens that each sequence keeps, by its id(), for those that ask.

    Together for all that ask for equally many: each call is several launches and a wait for the device.
    """
    asking: dict[int, list[tuple[RowGroup, list[int]]]] = {}
    for group, tokens in zip(output.groups, kept, strict=True):
        if (num_top := group.seq.sampling.logprobs) is not None and tokens:
            asking.setdefault(num_top, []).append((group, tokens))
    found: dict[int, list[TokenLogprobs]] = {}
    for num_top, of_each in asking.items():
        rows = [group.first_row + idx for group, tokens in of_each for idx in range(len(tokens))]
        flat = [token for _, tokens in of_each for token in tokens]
        scores = iter(token_logprobs(output.logits, rows, flat, num_top))
        found |= {id(group.seq): list(itertools.islice(scores, len(tokens))) for group, tokens in of_each}
    return found
