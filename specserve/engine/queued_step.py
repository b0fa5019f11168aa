"""A step that the device was told of and whose tokens are not known yet, and how the next one is queued behind it.

Where each sequence of a step gets one token, whichever that is, the next step's rows follow from this one's: a sequence
goes on by an unknown token, which names the row that it will be sampled at, and the device reads it there. The host
then learns of an end one step late, which costs a row and never a token: what a step gives to a sequence that ended
before it is dropped. The row's key and value go to a block that may be free by then, before anything that its next
owner writes, since a device does one step after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..adapters.lora import LoraAdapter
from ..compute.sampler import PendingSample
from ..compute.step_output import StepOutput
from ..drafting.proposer import Proposed
from ..drafting.step_costs import Verified
from ..schedule.scheduler import ScheduledSequence
from ..schedule.sequence import Status
from .reports import Event, Reports


@dataclass(slots=True)
class QueuedStep:
    """`output` and `pending` are None where its sequences had to run one by one, and are done."""

    items: list[ScheduledSequence]
    queued_at: float  # by the path's clock
    num_rows: int  # without drafts
    adapters: list[LoraAdapter]  # whose weights the device reads until it is done, also if they leave meanwhile
    events: list[Event] = field(default_factory=list)
    verified: Verified = field(default_factory=Verified)
    is_ahead: bool = False  # of the tokens of the step before
    launched_at: float = 0.0  # when the device could begin
    proposed: Proposed | None = None
    output: StepOutput | None = None
    pending: PendingSample | None = None
    num_tokens: int = 0  # that its sequences got
    is_passed: bool = False  # its sequences stand behind it: the next step was planned

    def can_be_passed(self, max_rows: int) -> bool:
        """Whether the next step may be planned before this one's tokens are known; `max_rows` can be named."""
        output = self._output_for(max_rows)
        return output is not None and all(item.seq.gets_any_token and not item.drafts for item in output.items)

    def has_room_beside(self, max_rows: int) -> bool:
        """Whether a step of other sequences may be queued behind it; nothing but its tokens is read of it then."""
        output = self._output_for(max_rows)
        return output is not None and all(item.seq.sampling.logprobs is None for item in output.items)

    def _output_for(self, max_rows: int) -> StepOutput | None:
        """Its output, if a step may be queued behind it at all."""
        output = self.output
        if output is None or output.prompt_rows or output.logits.shape[0] > max_rows:
            return None
        return output

    def pass_by(self, reports: Reports) -> None:
        """Let its sequences stand where they will: behind its rows, and a token of which only the row is known."""
        assert self.output is not None
        self.is_passed = True
        if len(self.output.items) < len(self.items):
            self.go_on_with_prompts(reports)
        for item, group in zip(self.output.items, self.output.groups, strict=True):
            seq = item.seq
            if seq.status is not Status.FINISHED:
                seq.tokens.append(-1 - group.first_row)
                seq.num_computed = len(seq.tokens) - 1

    def go_on_with_prompts(self, reports: Reports) -> None:
        """Of the sequences whose newest token is not among the rows."""
        for item in self.items:
            if not item.reaches_end and item.seq.status is not Status.FINISHED:
                item.seq.num_computed += item.num_rows
                reports.add_prompt(item)
