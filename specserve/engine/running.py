"""A request that runs: what belongs to its sequence beside the scheduling state, and where its output ends."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

from ..drafting.drafts import GrowingDraft
from ..messages import TokenLogprobs
from ..pooling_messages import AnyRequest
from ..schedule.sequence import Sequence as TokenSequence
from ..text.detokenizer import Detokenizer, TokenTexts
from .text_pooling import TextPooling

FinishReason = Literal["stop", "length", "abort"] | None


class Appended(msgspec.Struct, gc=False, eq=False):
    """What became of a step's tokens."""

    tokens: list[int]  # those that the sequence has now
    text: str | None = None  # what is certain of their text; None: nobody needed it yet, `text_of` says it
    finish_reason: FinishReason = None
    stop_reason: str | int | None = None
    num_silent: int = 0  # tokens at the end that are no text: an end of sequence, a stop token


def detokenizer_of(request: AnyRequest, texts: TokenTexts) -> Detokenizer | None:
    """What writes the text of its output; None where nobody wants any."""
    sampling = request.sampling
    if not sampling.detokenize:
        return None
    return Detokenizer(
        texts,
        request.prompt_token_ids,
        sampling.stop,
        sampling.include_stop_str_in_output,
        sampling.skip_special_tokens,
    )


class RunningRequest:
    """One of the engine's requests."""

    __slots__ = (
        "_eos", "_max_len", "_walks", "detokenizer", "drafts", "ends", "is_plain", "pooling", "prompt_logprobs", "seq",
    )  # fmt: skip

    def __init__(
        self,
        seq: TokenSequence,
        detokenizer: Detokenizer | None,
        drafts: GrowingDraft,
        eos_token_ids: Collection[int] = (),
        prompt_logprobs: list[TokenLogprobs | None] | None = None,
        pooling: TextPooling | None = None,
    ):
        self.pooling = pooling  # None: it generates
        self.seq, self.detokenizer, self.drafts, self.prompt_logprobs = seq, detokenizer, drafts, prompt_logprobs
        seq.owner = self
        sampling = seq.sampling
        minds_eos = seq.grammar is not None or not sampling.ignore_eos
        self._eos = frozenset(eos_token_ids if minds_eos else ())
        self.ends = self._eos.union(sampling.stop_token_ids)
        # Whether the end may lie elsewhere than at one of these tokens or at the last that is asked for.
        self._walks = bool(sampling.stop) or seq.grammar is not None or sampling.max_tokens == 0
        self._max_len = seq.max_len
        # Whether tokens that hold none of `ends` and stay below the last are appended, and that is all.
        self.is_plain = not (self._walks or sampling.logprobs is not None or drafts.head is not None or seq.is_traced)

    def append(self, tokens: list[int]) -> Appended:
        """Append tokens up to the first that ends the sequence. Text is read where a stop string may end it."""
        seq = self.seq
        if not self._walks and len(seq.tokens) + len(tokens) < self._max_len and self.ends.isdisjoint(tokens):
            seq.tokens += tokens
            return Appended(tokens)
        sampling = seq.sampling
        if sampling.max_tokens == 0:
            return Appended([], "", "length")
        kept: list[int] = []
        text = "" if sampling.stop else None
        is_complete = seq.grammar is not None and seq.grammar.is_terminated
        for token in tokens:
            seq.tokens.append(token)
            kept.append(token)
            if token in self.ends:
                reason = None if token in self._eos else token
                return Appended(kept, self._ended(text), "stop", reason, 1)
            if text is not None and self.detokenizer is not None:
                new, stop = self.detokenizer.push(token)
                text += new
                if stop is not None:
                    return Appended(kept, text, "stop", stop)
            if is_complete and len(kept) == len(tokens):
                return Appended(kept, self._ended(text), "stop")
            if len(seq.tokens) >= self._max_len:
                return Appended(kept, self._ended(text), "length")
        return Appended(kept, text)

    def text_of(self, appended: Appended) -> str:
        """The text of what was appended; to be asked in that order, once each. Empty where the server writes it."""
        if appended.text is not None:
            return appended.text
        if self.detokenizer is None:
            return ""
        is_last = appended.finish_reason is not None
        return self.detokenizer.write(appended.tokens, appended.num_silent, is_last)

    def _ended(self, text: str | None) -> str | None:
        return None if text is None or self.detokenizer is None else text + self.detokenizer.flush()
