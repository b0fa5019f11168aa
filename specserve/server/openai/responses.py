"""Deltas as OpenAI responses: whole objects and stream chunks, for chat and for completions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...chat.answer import ChatAnswer
from ...errors import ErrorInfo
from ...messages import Delta, TokenLogprobs, TokenTrace, Usage
from ...text.tokenizer import TextTokenizer
from ..error_bodies import openai_error
from ..generation.job import Job
from .request_types import ChatRequest, CompletionRequest
from .usage import speculation_stats, usage_of


@dataclass(slots=True)
class Choice:
    """What has come of one choice so far."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    trace: list[TokenTrace] = field(default_factory=list)  # in a stream, what no chunk has told of
    text_offset: int = 0  # of the next token, in completions' logprobs

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.tokens += delta.token_ids
        self.logprobs += delta.logprobs or []
        self.trace += delta.trace or []
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        self.usage = delta.usage

    def mean_logprob(self) -> float:
        """Of its tokens, under the raw distribution: what best_of ranks by."""
        return sum(item.logprob for item in self.logprobs) / max(1, len(self.logprobs))


class ResponseBuilder:
    """Shapes the output of one job."""

    def __init__(self, job: Job):
        self._job = job
        self.choices = [Choice() for _ in job.requests]
        self._is_open = False  # whether a stream has begun
        self._has_said_routing = False  # which the first chunk does
        self._traces = job.requests[0].speculation.trace
        self._answers: list[ChatAnswer] = []
        if isinstance(job.request, ChatRequest):
            shown = job.request.include_reasoning is not False
            self._answers = [ChatAnswer(job.tools, job.thinking, shown) for _ in job.requests]

    def add(self, idx: int, delta: Delta) -> None:
        choice = self.choices[idx]
        choice.add(delta)
        if self._answers:
            answer = self._answers[idx]
            answer.feed(delta.text, final=delta.finish_reason is not None)
            choice.finish_reason = answer.finish_reason(choice.finish_reason)

    def _usage(self) -> dict[str, object]:
        usages = [choice.usage for choice in self.choices if choice.usage is not None]
        usage = usage_of(usages, len(self._job.prompts), self._job.n)
        if self._job.request.return_speculation_stats:
            usage["speculation"] = speculation_stats(usages)
        return usage

    def _best(self) -> list[int]:
        """The sequences that are answered: of each prompt those of the highest mean log-probability, best first."""
        job = self._job
        if job.n == job.num_choices:
            return list(range(len(self.choices)))
        kept = []
        for first in range(0, len(self.choices), job.n):
            of_prompt = range(first, first + job.n)
            kept += sorted(of_prompt, key=lambda idx: -self.choices[idx].mean_logprob())[: job.num_choices]
        return kept

    def whole(self) -> dict[str, Any]:
        """The response of a request that does not stream."""
        choices = []
        for index, idx in enumerate(self._best()):
            choice = self.choices[idx]
            echo_text, logprobs = self._echo(idx), self._logprobs(choice, choice.tokens, choice.logprobs, idx)
            body: dict[str, Any] = {"index": index, "logprobs": logprobs, "finish_reason": choice.finish_reason}
            if self._job.is_chat:
                body["message"] = {"role": "assistant", **self._answers[idx].message(), "refusal": None}
            else:
                body["text"] = echo_text + choice.text
            body["stop_reason"] = choice.stop_reason
            if self._traces:
                body["trace"] = choice.trace
            choices.append(body)
        head = self._head("chat.completion", "text_completion") | self._routing()
        return {**head, "choices": choices, "usage": self._usage()}

    def events(self, idx: int, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of one delta, in a stream; none while it says nothing yet."""
        opening = [] if self._is_open else self._opening()
        self._is_open = True
        self.add(idx, delta)
        chunk = self._delta_chunk(idx, delta)
        chunks = opening if chunk is None else [*opening, chunk]
        if chunks and not self._has_said_routing:
            chunks[0] |= self._routing()
            self._has_said_routing = True
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        """The chunk of the usage, where it was asked for."""
        options = self._job.request.stream_options
        if options is None or not options.include_usage:
            return []
        return [{**self._head("chat.completion.chunk", "text_completion"), "choices": [], "usage": self._usage()}]

    def error(self, info: ErrorInfo) -> dict[str, Any]:
        return openai_error(info)

    def _opening(self) -> list[dict[str, Any]]:
        """Chunks before any token: the role in chat, the prompt in completions that echo without logprobs."""
        if self._job.is_chat:
            return [
                self._chunk(idx, {"role": "assistant", "content": "", "refusal": None}, None, None)
                for idx in range(len(self.choices))
            ]
        if self._job.request.logprobs is None:
            return [self._chunk(idx, text, None, None) for idx in range(len(self.choices)) if (text := self._echo(idx))]
        return []

    def _delta_chunk(self, idx: int, delta: Delta) -> dict[str, Any] | None:
        """The chunk of a delta that has been added; None when it says nothing yet."""
        choice = self.choices[idx]
        logprobs = self._logprobs(choice, delta.token_ids, delta.logprobs or [], idx, delta.prompt_logprobs)
        text = delta.text
        if delta.prompt_logprobs is not None:
            text = self._echo(idx) + text
        payload: Any = self._answers[idx].delta() if self._answers else text  # what may begin a marker or a call waits
        if not payload and logprobs is None and delta.finish_reason is None:
            return None
        return self._chunk(idx, payload, logprobs, delta)

    def _usage_so_far(self) -> dict[str, int]:
        prompt_tokens = sum(len(ids) for _, ids in self._job.prompts)
        completion_tokens = sum(len(choice.tokens) for choice in self.choices)
        total = prompt_tokens + completion_tokens
        return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}

    def _head(self, chat_object: str, completion_object: str) -> dict[str, Any]:
        job = self._job
        kind = chat_object if job.is_chat else completion_object
        return {"id": job.id, "object": kind, "created": job.created, "model": job.model}

    def _routing(self) -> dict[str, Any]:
        return {} if self._job.routing is None else {"routing": self._job.routing}

    def _chunk(self, idx: int, payload: Any, logprobs: Any, delta: Delta | None) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": idx,
            "delta" if self._job.is_chat else "text": payload,
            "logprobs": logprobs,
            "finish_reason": self.choices[idx].finish_reason if delta else None,
        }
        if delta is not None and delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if delta is not None and self._traces:
            choice["trace"], self.choices[idx].trace = self.choices[idx].trace, []
        chunk = {**self._head("chat.completion.chunk", "text_completion"), "choices": [choice]}
        options = self._job.request.stream_options
        if options is not None and options.include_usage:
            chunk["usage"] = self._usage_so_far() if options.continuous_usage_stats else None
        return chunk

    def _echo(self, idx: int) -> str:
        job = self._job
        if not isinstance(job.request, CompletionRequest) or not job.request.echo:
            return ""
        text, ids = job.prompts[idx // job.n]
        return text if text is not None else job.tokenizer.decode(ids)

    def _logprobs(
        self,
        choice: Choice,
        tokens: list[int],
        logprobs: list[TokenLogprobs],
        idx: int,
        prompt_logprobs: list[TokenLogprobs | None] | None = None,
    ) -> dict[str, Any] | None:
        job = self._job
        request = job.request
        if request.logprobs is None or request.logprobs is False:
            return None
        if job.is_chat:
            return {"content": chat_logprobs(job.tokenizer, tokens, logprobs), "refusal": None} if tokens else None
        scored: list[TokenLogprobs | None] = list(logprobs)
        ids = list(tokens)
        prompt = prompt_logprobs if request.stream else choice.prompt_logprobs
        if prompt is not None:
            ids, scored = [*job.prompts[idx // job.n][1], *ids], [*prompt, *scored]
        if not ids:
            return None
        offset = choice.text_offset
        body = completion_logprobs(job.tokenizer, ids, scored, offset)
        choice.text_offset = offset + sum(len(token) for token in body["tokens"])
        return body


def chat_logprobs(tokenizer: TextTokenizer, ids: list[int], logprobs: list[TokenLogprobs]) -> list[dict[str, Any]]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": tokenizer.token_text(token), "logprob": finite(logprob), "bytes": tokenizer.token_bytes(token)}

    return [
        {**entry(token, item.logprob), "top_logprobs": [entry(*top) for top in item.top]}
        for token, item in zip(ids, logprobs, strict=True)
    ]


def completion_logprobs(
    tokenizer: TextTokenizer, ids: list[int], logprobs: list[TokenLogprobs | None], offset: int
) -> dict[str, Any]:
    tokens = [tokenizer.token_text(token) for token in ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [None if item is None else finite(item.logprob) for item in logprobs],
        "top_logprobs": [
            None if item is None else {tokenizer.token_text(token): finite(value) for token, value in item.top}
            for item in logprobs
        ],
        "text_offset": offsets,
    }


def finite(logprob: float) -> float:
    """JSON has no infinities: an impossible token is reported as -9999, as OpenAI does."""
    return max(logprob, -9999.0)
