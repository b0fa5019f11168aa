"""The answers of the HTTP API beside LoRAX's, as msgspec types: what the OpenAPI document says and tests hold them to.

`responses` builds OpenAI's answers as plain objects, because most fields depend on the request; every field that it
may send is here, and no other.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ...adapter_files import ExampleRole
from ...adapter_kinds import AdapterType
from ...adapter_messages import AdapterInfo
from ...messages import TokenTrace
from ..routing.types import Routing

FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class Error(msgspec.Struct, forbid_unknown_fields=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(msgspec.Struct, forbid_unknown_fields=True):
    error: Error


class PromptTokensDetails(msgspec.Struct, forbid_unknown_fields=True):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, forbid_unknown_fields=True):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class SpeculationStats(msgspec.Struct, forbid_unknown_fields=True):
    """What speculation did; asked for with `return_speculation_stats`."""

    num_forwards: int
    draft_tokens: int
    accepted_draft_tokens: int
    mean_accepted_length: float
    accepted_by_source: dict[str, int]


class UsageResponse(msgspec.Struct, forbid_unknown_fields=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None
    speculation: SpeculationStats | None = None


class CompletionLogprobs(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(msgspec.Struct, forbid_unknown_fields=True):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, forbid_unknown_fields=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, forbid_unknown_fields=True):
    content: list[TokenLogprob] | None
    refusal: None = None


class CompletionChoice(msgspec.Struct, forbid_unknown_fields=True):
    """Of a whole answer and of a chunk alike."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    trace: list[TokenTrace] | None = None  # asked for with `speculation.trace`


class CompletionResponse(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageResponse | None = None
    routing: Routing | None = None  # with model "auto"; in a stream of the first chunk


class CalledFunction(msgspec.Struct, forbid_unknown_fields=True):
    name: str | None = None
    arguments: str | None = None


class ToolCall(msgspec.Struct, forbid_unknown_fields=True):
    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = None  # of the call that a chunk belongs to


class ChatMessage(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same


class ChatChoice(msgspec.Struct, forbid_unknown_fields=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    trace: list[TokenTrace] | None = None  # asked for with `speculation.trace`


class ChatResponse(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageResponse
    routing: Routing | None = None  # with model "auto"


class ChatDelta(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChatChunkChoice(msgspec.Struct, forbid_unknown_fields=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    trace: list[TokenTrace] | None = None  # asked for with `speculation.trace`


class ChatChunk(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageResponse | None = None
    routing: Routing | None = None  # of the first chunk, with model "auto"


class Model(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(msgspec.Struct, forbid_unknown_fields=True):
    object: Literal["list"]
    data: list[Model]


class TokenizeResponse(msgspec.Struct, forbid_unknown_fields=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str


class AdapterLoadedResponse(msgspec.Struct, forbid_unknown_fields=True):
    message: str
    adapter: AdapterInfo


class AdapterEntry(msgspec.Struct, forbid_unknown_fields=True):
    """A name that can be asked for. What is null is not known before the first load."""

    id: str
    object: Literal["adapter"]
    tier: Literal["device", "host", "disk"]  # the best memory that holds it; on a CPU steps read host
    is_loading: bool
    pinned: bool
    size_bytes: int | None  # in memory, head and history included
    content_hash: str | None
    max_rank: int | None
    adapter_type: AdapterType | None  # what it is for
    running: int  # requests with this content that run, or wait to
    uses: int  # requests since the server started
    last_used: int | None  # seconds since 1970
    acceptance: float | None  # of drafts that were verified since it was loaded
    has_report: bool
    has_examples: bool


class AdapterList(msgspec.Struct, forbid_unknown_fields=True):
    object: Literal["list"]
    data: list[AdapterEntry]


class ExampleMessage(msgspec.Struct, omit_defaults=True):
    role: ExampleRole
    content: str


class AdapterExample(msgspec.Struct, omit_defaults=True):
    """A conversation, or a text, for the adapter to go on with; one of both."""

    title: str
    messages: list[ExampleMessage] | None = None
    prompt: str | None = None


class AdapterExamples(msgspec.Struct, forbid_unknown_fields=True):
    object: Literal["list"]
    data: list[AdapterExample]


class MessageResponse(msgspec.Struct, forbid_unknown_fields=True):
    message: str


class StateResponse(msgspec.Struct, forbid_unknown_fields=True):
    status: str


class VersionResponse(msgspec.Struct, forbid_unknown_fields=True):
    version: str


OpenApiDocument = dict[str, Any]
