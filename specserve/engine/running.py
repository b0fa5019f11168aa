"""A request that runs: what belongs to its sequence beside the scheduling state, and where its output ends."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..drafters.chooser import DraftChooser
from ..messages import TokenLogprobs
from ..schedule.sequence import Sequence as TokenSequence
from ..text.detokenizer import Detokenizer

FinishReason = Literal["stop", "length", "abort"] | None


class Appended(NamedTuple):
    """What became of a step's tokens."""

    tokens: list[int]  # those that the sequence has now
    text: str  # what is certain of their text
    finish_reason: FinishReason = None
    stop_reason: str | int | None = None


@dataclass(slots=True)
class RunningRequest:
    """One of the engine's requests."""

    seq: TokenSequence
    detokenizer: Detokenizer
    drafts: DraftChooser
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    def append(self, tokens: Sequence[int], eos_token_ids: Collection[int]) -> Appended:
        """Append tokens up to the first that ends the sequence."""
        seq, sampling = self.seq, self.seq.sampling
        text = ""
        kept: list[int] = []
        if sampling.max_tokens == 0:
            return Appended(kept, text, "length")
        is_complete = seq.grammar is not None and seq.grammar.is_terminated
        for token in tokens:
            seq.append(token)
            kept.append(token)
            if token in eos_token_ids and (seq.grammar is not None or not sampling.ignore_eos):
                return Appended(kept, text + self.detokenizer.flush(), "stop")
            if token in sampling.stop_token_ids:
                return Appended(kept, text + self.detokenizer.flush(), "stop", token)
            new, stop = self.detokenizer.push(token)
            text += new
            if stop is not None:
                return Appended(kept, text, "stop", stop)
            if is_complete and len(kept) == len(tokens):
                return Appended(kept, text + self.detokenizer.flush(), "stop")
            if seq.output_len >= sampling.max_tokens:
                return Appended(kept, text + self.detokenizer.flush(), "length")
        return Appended(kept, text)
