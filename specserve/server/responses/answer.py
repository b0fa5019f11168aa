"""A job's answer on /v1/responses: the response object, whole or as the events of a stream.

Owns the life of one response: created, in progress, then completed, incomplete or failed. A stream and a whole answer
are made by the same `Output`, so they hold the same items.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from ...errors import ErrorInfo
from ...messages import Delta, Usage
from ..generation.job import Job
from ..openai.response_types import SpeculationStats
from ..openai.usage import speculation_stats
from .conversion import LOGPROBS, function_tools
from .output import Output
from .request_types import FunctionTool, ResponsesRequest
from .response_types import (
    Completed,
    Created,
    ErrorCode,
    Event,
    Failed,
    Incomplete,
    IncompleteDetails,
    InProgress,
    InputTokensDetails,
    OutputTokensDetails,
    Response,
    ResponseError,
    ResponseReasoning,
    ResponseText,
    ResponseUsage,
)


class ResponseBuilder:
    """Shapes the output of one job. `keep` is called with a response that has ended, whole or cut by a limit."""

    def __init__(self, job: Job, request: ResponsesRequest, is_stored: bool, keep: Callable[[Response], None]):
        self._job = job
        self._request = request
        self._keep = keep
        self._output = Output(job, request.include_reasoning is not False)
        self._num_sent = 0
        self._usage: Usage | None = None
        self._is_cut = False
        self._response = _begun(job, request, is_stored)

    def add(self, delta: Delta) -> list[Event]:
        """The events of a delta."""
        if delta.finish_reason is not None:
            self._usage, self._is_cut = delta.usage, delta.finish_reason == "length"
        return self._output.feed(delta)

    def whole(self) -> Response:
        """The response, once all deltas have been added."""
        assert self._usage is not None
        response = self._with_output(status="incomplete" if self._is_cut else "completed")
        response.completed_at = None if self._is_cut else int(time.time())
        response.incomplete_details = IncompleteDetails("max_output_tokens") if self._is_cut else None
        response.usage = self._usage_of(self._usage)
        self._keep(response)
        return response

    def events(self, idx: int, delta: Delta) -> list[Event]:
        opening: list[Event] = []
        if not self._num_sent:
            opening = [Created(response=self._response), InProgress(response=self._response)]
        return self._numbered([*opening, *self.add(delta)])

    def closing(self) -> list[Event]:
        response = self.whole()
        kind = Incomplete if self._is_cut else Completed
        return self._numbered([kind(response=response)])

    def error(self, info: ErrorInfo) -> Event:
        self._output.abandon()
        response = self._with_output(status="failed")
        response.error = ResponseError(_error_code(info.status), info.message, info.type, info.param)
        return self._numbered([Failed(response=response)])[0]

    def _with_output(self, **fields: Any) -> Response:
        return msgspec.structs.replace(self._response, output=self._output.items, **fields)

    def _numbered(self, events: list[Event]) -> list[Event]:
        for event in events:
            event.sequence_number = self._num_sent
            self._num_sent += 1
        return events

    def _usage_of(self, usage: Usage) -> ResponseUsage:
        stats = None
        if self._request.return_speculation_stats:
            stats = msgspec.convert(speculation_stats([usage]), SpeculationStats)
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokensDetails(usage.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputTokensDetails(
                min(self._output.num_reasoning_tokens, usage.completion_tokens),
                usage.accepted_prediction_tokens,
                usage.rejected_prediction_tokens,
            ),
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            speculation=stats,
        )


def _begun(job: Job, request: ResponsesRequest, is_stored: bool) -> Response:
    """The response before anything has come: who it is, and the settings that it is made with."""
    sampling, reasoning = job.requests[0].sampling, request.reasoning
    format = request.text.format if request.text is not None else None
    tools = function_tools(request)
    return Response(
        id=job.id,
        created_at=job.created,
        status="in_progress",
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        max_tool_calls=request.max_tool_calls,
        metadata=request.metadata or {},
        model=job.model,
        output=[],
        parallel_tool_calls=request.parallel_tool_calls is not False,
        previous_response_id=request.previous_response_id,
        prompt_cache_key=request.prompt_cache_key,
        reasoning=ResponseReasoning(None if reasoning is None else reasoning.effort),
        safety_identifier=request.safety_identifier,
        store=is_stored,
        temperature=sampling.temperature,
        text=ResponseText({"type": "text"} if format is None else _said(format)),
        tool_choice=request.tool_choice if request.tool_choice is not None else "auto",
        tools=[_shown(tool) for tool in tools],
        top_logprobs=(request.top_logprobs or 0) if LOGPROBS in (request.include or ()) else 0,
        top_p=sampling.top_p,
        user=request.user,
        routing=msgspec.UNSET if job.routing is None else job.routing,
    )


def _error_code(status: int) -> ErrorCode:
    """OpenAI has few codes; the message says the rest."""
    if status == 429:
        return "rate_limit_exceeded"
    return "invalid_prompt" if status < 500 else "server_error"


def _said(fields: msgspec.Struct) -> dict[str, Any]:
    """What a client has sent of `fields`."""
    given: dict[str, Any] = msgspec.to_builtins(fields)
    return {name: value for name, value in given.items() if value is not None}


def _shown(tool: FunctionTool) -> dict[str, Any]:
    return {"parameters": None, "strict": None, **_said(tool)}
