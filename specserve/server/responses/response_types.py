"""The answers of /v1/responses as msgspec types: the response, its items, and the events of a stream.

Names and fields are OpenAI's. `answer` fills them, the OpenAPI document shows them, and tests hold answers to them and
to the openai client's own models.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ..openai.response_types import SpeculationStats, TokenLogprob
from ..routing.types import Routing

ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]
ErrorCode = Literal["server_error", "rate_limit_exceeded", "invalid_prompt"]


class _Tagged(msgspec.Struct, forbid_unknown_fields=True, tag_field="type"):
    pass


class OutputTextPart(_Tagged, tag="output_text"):
    text: str = ""
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class ReasoningTextPart(_Tagged, tag="reasoning_text"):
    text: str = ""


class MessageItem(_Tagged, tag="message", kw_only=True):
    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputTextPart] = []


class ReasoningItem(_Tagged, tag="reasoning", kw_only=True):
    """What the model said between its thinking markers; nobody summarises it, so `summary` is empty."""

    id: str
    status: ItemStatus
    summary: list[Any] = []
    content: list[ReasoningTextPart] = []
    encrypted_content: None = None


class FunctionCallItem(_Tagged, tag="function_call", kw_only=True):
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str = ""


OutputItem = MessageItem | ReasoningItem | FunctionCallItem


class InputTokensDetails(msgspec.Struct, forbid_unknown_fields=True):
    cached_tokens: int
    cache_write_tokens: int = 0  # nobody pays for writes, so they are not counted


class OutputTokensDetails(msgspec.Struct, forbid_unknown_fields=True):
    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class ResponseUsage(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int
    speculation: SpeculationStats | None = None


class ResponseError(msgspec.Struct, forbid_unknown_fields=True):
    code: ErrorCode
    message: str
    type: str
    param: str | None


class IncompleteDetails(msgspec.Struct, forbid_unknown_fields=True):
    reason: Literal["max_output_tokens"]


class ResponseReasoning(msgspec.Struct, forbid_unknown_fields=True):
    effort: str | None
    summary: str | None = None


class ResponseText(msgspec.Struct, forbid_unknown_fields=True):
    format: dict[str, Any]
    verbosity: str = "medium"


class Response(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The answer, with the settings that it was made with."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: ResponseStatus
    background: Literal[False] = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ResponseReasoning
    safety_identifier: str | None
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: ResponseText
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
    routing: Routing | msgspec.UnsetType = msgspec.UNSET  # with model "auto"


class DeletedResponse(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class Event(_Tagged, kw_only=True):
    """`sequence_number` is set when the event is sent; it counts from 0 without a gap."""

    sequence_number: int = -1


class ResponseEvent(Event, kw_only=True):
    response: Response


class Created(ResponseEvent, tag="response.created", kw_only=True):
    pass


class InProgress(ResponseEvent, tag="response.in_progress", kw_only=True):
    pass


class Completed(ResponseEvent, tag="response.completed", kw_only=True):
    pass


class Incomplete(ResponseEvent, tag="response.incomplete", kw_only=True):
    pass


class Failed(ResponseEvent, tag="response.failed", kw_only=True):
    pass


class OutputEvent(Event, kw_only=True):
    output_index: int


class ItemAdded(OutputEvent, tag="response.output_item.added", kw_only=True):
    item: OutputItem


class ItemDone(OutputEvent, tag="response.output_item.done", kw_only=True):
    item: OutputItem


class ItemEvent(OutputEvent, kw_only=True):
    item_id: str


class PartEvent(ItemEvent, kw_only=True):
    content_index: int = 0


class PartAdded(PartEvent, tag="response.content_part.added", kw_only=True):
    part: OutputTextPart | ReasoningTextPart


class PartDone(PartEvent, tag="response.content_part.done", kw_only=True):
    part: OutputTextPart | ReasoningTextPart


class TextDelta(PartEvent, tag="response.output_text.delta", kw_only=True):
    delta: str
    logprobs: list[TokenLogprob]


class TextDone(PartEvent, tag="response.output_text.done", kw_only=True):
    text: str
    logprobs: list[TokenLogprob]


class ReasoningDelta(PartEvent, tag="response.reasoning_text.delta", kw_only=True):
    delta: str


class ReasoningDone(PartEvent, tag="response.reasoning_text.done", kw_only=True):
    text: str


class ArgumentsDelta(ItemEvent, tag="response.function_call_arguments.delta", kw_only=True):
    delta: str


class ArgumentsDone(ItemEvent, tag="response.function_call_arguments.done", kw_only=True):
    arguments: str


StreamEvent = (
    Created | InProgress | Completed | Incomplete | Failed | ItemAdded | ItemDone | PartAdded | PartDone
    | TextDelta | TextDone | ReasoningDelta | ReasoningDone | ArgumentsDelta | ArgumentsDone
)  # fmt: skip


def mark(event: Event) -> bytes:
    """What stands before an event's JSON in a stream: its type as the event's name."""
    return f"event: {event.__struct_config__.tag}\ndata: ".encode()
