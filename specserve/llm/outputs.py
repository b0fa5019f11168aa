"""What comes of a prompt, in vLLM's shapes: `RequestOutput` with its `outputs`, whole or as far as a stream has come.

Built from the same deltas as the HTTP API's answers. Values: what a stream has given does not change any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..chat.answer import ChatAnswer
from ..messages import Delta, TokenLogprobs, TokenTrace, Usage
from ..server.generation.job import Job
from ..text.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one token at one place, under the model's raw distribution; rank 1 is the most likely token."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the `n` outputs of a prompt. `text` is all of it so far; `delta` what is new since the last of a stream.

    In a chat `text` is what the model wrote, and `message`, once finished, what it means: OpenAI's object, with
    content, thinking and tool calls apart. `usage` comes with the end, and says what speculation did.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None  # stop, length or tool_calls
    stop_reason: str | int | None = None  # the stop string or token that ended it
    message: dict[str, Any] | None = None
    usage: Usage | None = None
    delta: str = ""
    trace: list[TokenTrace] | None = None  # who guessed each token, where `SamplingParams(trace=True)` asked

    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens that a forward of the model gave; None before the end."""
        return None if self.usage is None else self.usage.completion_tokens / max(1, self.usage.num_forwards)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its outputs. `lora_request` is the name of the adapter; None is the base model."""

    request_id: str
    prompt: str | None  # None for token ids and in a chat
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    lora_request: str | None = None
    num_cached_tokens: int | None = None  # of the prompt, in the prefix cache; with the end


@dataclass(slots=True)
class _Growing:
    """One output on its way."""

    index: int
    answer: ChatAnswer | None
    parts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    trace: list[TokenTrace] | None = None
    last: Delta | None = None

    def add(self, delta: Delta, tokenizer: TextTokenizer) -> None:
        self.parts.append(delta.text)
        self.token_ids += delta.token_ids
        for token, scored in zip(delta.token_ids, delta.logprobs or (), strict=False):
            self.logprobs.append(_logprobs(tokenizer, token, scored))
            self.cumulative_logprob += scored.logprob
        if delta.trace is not None:
            self.trace = [*(self.trace or ()), *delta.trace]
        self.last = delta
        if self.answer is not None:
            self.answer.feed(delta.text, final=delta.finish_reason is not None)

    def shown(self, has_logprobs: bool, new_text: str) -> CompletionOutput:
        last, answer, message = self.last, self.answer, None
        finish_reason: str | None = last.finish_reason if last is not None else None
        if answer is not None and finish_reason is not None:
            message = {"role": "assistant", **answer.message()}
            finish_reason = answer.finish_reason(finish_reason)
        return CompletionOutput(
            index=self.index,
            text="".join(self.parts),
            token_ids=tuple(self.token_ids),
            cumulative_logprob=self.cumulative_logprob if has_logprobs else None,
            logprobs=self.logprobs[:] if has_logprobs else None,
            finish_reason=finish_reason,
            stop_reason=last.stop_reason if last is not None else None,
            message=message,
            usage=last.usage if last is not None else None,
            delta=new_text,
            trace=self.trace,
        )


class OutputBuilder:
    """The output of one job, which has one prompt. `has_logprobs`: they were asked for."""

    def __init__(self, job: Job, has_logprobs: bool):
        self._job = job
        self._has_logprobs = has_logprobs
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._growing = [
            _Growing(idx, ChatAnswer(job.tools, job.thinking, include_reasoning=True) if job.is_chat else None)
            for idx in range(len(job.requests))
        ]
        self._streamed = [CompletionOutput(idx) for idx in range(len(job.requests))]

    def add(self, idx: int, delta: Delta) -> None:
        tokenizer, ((_, ids),) = self._job.tokenizer, self._job.prompts
        self._growing[idx].add(delta, tokenizer)
        if delta.prompt_logprobs is not None and self._prompt_logprobs is None:
            self._prompt_logprobs = [
                None if scored is None else _logprobs(tokenizer, token, scored)
                for token, scored in zip(ids, delta.prompt_logprobs, strict=True)
            ]

    def whole(self) -> RequestOutput:
        """What there is now."""
        return self._output([growing.shown(self._has_logprobs, "") for growing in self._growing])

    def streamed(self, idx: int, delta: Delta) -> RequestOutput:
        """The same after another delta; only output `idx` has anything new."""
        self.add(idx, delta)
        outputs = [replace(output, delta="") if output.delta else output for output in self._streamed]
        outputs[idx] = self._growing[idx].shown(self._has_logprobs, delta.text)
        self._streamed = outputs[:]
        return self._output(outputs)

    def _output(self, outputs: list[CompletionOutput]) -> RequestOutput:
        job, ((text, ids),) = self._job, self._job.prompts
        usage = outputs[0].usage
        return RequestOutput(
            request_id=job.id,
            prompt=text,
            prompt_token_ids=ids,
            outputs=outputs,
            finished=all(output.finish_reason is not None for output in outputs),
            prompt_logprobs=self._prompt_logprobs,
            lora_request=job.adapter,
            num_cached_tokens=None if usage is None else usage.cached_tokens,
        )


def _logprobs(tokenizer: TextTokenizer, token: int, scored: TokenLogprobs) -> dict[int, Logprob]:
    """The most likely tokens' and the sampled one's, which comes first as in vLLM."""
    found = {token: Logprob(scored.logprob, scored.rank, tokenizer.token_text(token))}
    for rank, (other, logprob) in enumerate(scored.top, start=1):
        found.setdefault(other, Logprob(logprob, rank, tokenizer.token_text(other)))
    return found
