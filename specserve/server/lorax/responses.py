"""Deltas in LoRAX's shapes: whole answers, stream events and response headers.

A token's text is what it adds to the text before it, so the texts of tokens that are not special join to
`generated_text`. `skipped` marks tokens that came with another one's forward: what speculation saved.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import cast

from msgspec import UNSET

from ...errors import ErrorInfo
from ...messages import Delta, TokenLogprobs
from ...text.tokenizer import TextTokenizer
from ..error_bodies import lorax_error
from ..generation.job import Job
from ..openai.responses import Choice, finite
from .types import (
    AlternativeToken,
    BestOfSequence,
    Details,
    FinishReason,
    LoraxError,
    LoraxParameters,
    LoraxResponse,
    LoraxStreamResponse,
    PrefillToken,
    StreamDetails,
    Token,
)


@dataclass(slots=True)
class Answer(Choice):
    """One sequence; `skipped` says of each token whether an earlier one's forward brought it."""

    skipped: list[bool] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        Choice.add(self, delta)
        self.skipped += [idx > 0 for idx in range(len(delta.token_ids))]


class LoraxBuilder:
    """Shapes the output of one job; `prefix` is put before the text, `seed` is reported."""

    def __init__(self, job: Job, parameters: LoraxParameters, prefix: str, seed: int | None, eos_token_id: int):
        self._job = job
        self._parameters = parameters
        self._prefix = prefix
        self._seed = seed
        self._eos_token_id = eos_token_id
        self.answers = [Answer() for _ in job.requests]
        self._texts = _TokenTexts(job.tokenizer, job.prompts[0][1])

    def add(self, idx: int, delta: Delta) -> None:
        self.answers[idx].add(delta)

    @property
    def _best(self) -> Answer:
        return max(self.answers, key=Answer.mean_logprob)

    def whole(self) -> LoraxResponse:
        best, parameters = self._best, self._parameters
        text = self._prefix + best.text
        if not (parameters.details or parameters.decoder_input_details):
            return LoraxResponse(text)
        assert best.usage is not None
        others = [self._sequence(answer) for answer in self.answers if answer is not best]
        details = Details(
            finish_reason=finish_reason(best),
            prompt_tokens=best.usage.prompt_tokens,
            generated_tokens=len(best.tokens),
            skipped_tokens=sum(best.skipped),
            seed=self._seed,
            prefill=self._prefill(best),
            tokens=self._tokens(best),
            best_of_sequences=others or UNSET,
        )
        return LoraxResponse(text, details)

    def events(self, idx: int, delta: Delta) -> list[LoraxStreamResponse]:
        """The events of one delta of the only sequence, one for each token; the last has the whole text too."""
        self.add(idx, delta)
        answer = self.answers[idx]
        finished = delta.finish_reason is not None
        skipped = answer.skipped[len(answer.skipped) - len(delta.token_ids) :]
        tokens = self._texts.tokens(delta.token_ids, delta.logprobs or [], skipped)
        if finished:
            tail = self._texts.flush()
            if not tokens:  # ended by a grammar or a limit without a token of its own; the shape needs one
                tokens = [Token(self._eos_token_id, "", 0.0, True, False)]
            tokens[-1].text += tail
        events = [LoraxStreamResponse(token) for token in tokens]
        if finished:
            assert delta.usage is not None
            events[-1].generated_text = self._prefix + answer.text
            if self._parameters.details:
                events[-1].details = StreamDetails(
                    finish_reason(answer), delta.usage.prompt_tokens, len(answer.tokens), self._seed
                )
        return events

    def closing(self) -> list[LoraxStreamResponse]:
        return []

    def error(self, info: ErrorInfo) -> LoraxError:
        return lorax_error(info)[1]

    def _sequence(self, answer: Answer) -> BestOfSequence:
        return BestOfSequence(
            generated_text=self._prefix + answer.text,
            finish_reason=finish_reason(answer),
            generated_tokens=len(answer.tokens),
            seed=self._seed,
            prefill=self._prefill(answer),
            tokens=self._tokens(answer),
        )

    def _tokens(self, answer: Answer) -> list[Token]:
        texts = _TokenTexts(self._job.tokenizer, self._job.prompts[0][1])
        tokens = texts.tokens(answer.tokens, answer.logprobs, answer.skipped)
        if tokens:
            tokens[-1].text += texts.flush()
        return tokens

    def _prefill(self, answer: Answer) -> list[PrefillToken]:
        if not self._parameters.decoder_input_details:
            return []
        ids, scores = self._job.prompts[0][1], answer.prompt_logprobs or []
        return [
            PrefillToken(token, self._job.tokenizer.token_text(token), None if item is None else finite(item.logprob))
            for token, item in zip(ids, scores, strict=True)
        ]


class _TokenTexts:
    """The text that each token of one sequence adds."""

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: list[int]):
        self._tokenizer = tokenizer
        self._detokenizer = tokenizer.detokenizer(prompt_ids)

    def tokens(self, ids: list[int], logprobs: list[TokenLogprobs], skipped: list[bool]) -> list[Token]:
        result = []
        for token, item, was_skipped in zip(ids, logprobs, skipped, strict=True):
            text, _ = self._detokenizer.push(token)
            special = self._tokenizer.is_special(token)
            alternatives = [
                AlternativeToken(other, self._tokenizer.token_text(other), finite(value)) for other, value in item.top
            ]
            result.append(Token(token, text, finite(item.logprob), special, was_skipped, alternatives or UNSET))
        return result

    def flush(self) -> str:
        return self._detokenizer.flush()


class Timer:
    """When the parts of a request were done; `headers` are LoRAX's, in milliseconds."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._validated = self._start
        self._first_token: float | None = None

    def validated(self) -> None:
        self._validated = time.monotonic()

    def token(self) -> None:
        if self._first_token is None:
            self._first_token = time.monotonic()

    def headers(self, answers: list[Answer]) -> dict[str, str]:
        """Times and counts of a finished request; counts are the answered sequence's, queueing is the engine's."""
        now = time.monotonic()
        best = max(answers, key=Answer.mean_logprob)
        assert best.usage is not None
        num_tokens = len(best.tokens)
        total, validation, queue = now - self._start, self._validated - self._start, best.usage.queue_s
        inference = max(0.0, total - validation - queue)
        first = (self._first_token or now) - self._validated - queue
        seconds = {
            "x-compute-time": total,
            "x-total-time": total,
            "x-validation-time": validation,
            "x-queue-time": queue,
            "x-inference-time": inference,
            "x-time-per-token": inference / max(1, num_tokens),
            "x-time-to-first-token": max(0.0, first),
            "x-time-per-output-token": max(0.0, inference - first) / max(1, num_tokens - 1),
        }
        counts = {
            "x-prompt-tokens": best.usage.prompt_tokens,
            "x-generated-tokens": num_tokens,
            "x-skipped-tokens": sum(best.skipped),
            "x-total-tokens": best.usage.prompt_tokens + num_tokens,
        }
        times = {name: str(int(1000 * value)) for name, value in seconds.items()}
        return times | {name: str(value) for name, value in counts.items()}


def finish_reason(answer: Answer) -> FinishReason:
    """LoRAX's names: a stop without a stop string is the end-of-sequence token."""
    if answer.finish_reason == "stop":
        return "eos_token" if answer.stop_reason is None else "stop_sequence"
    return cast(FinishReason, answer.finish_reason)
