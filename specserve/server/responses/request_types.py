"""The body of POST /v1/responses: every field that is understood, and no other.

Those that all routes share mean what they mean on /v1/chat/completions. Items of `input` and tools have several forms;
`input_items` and `conversion` read them.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ..openai.request_types import CommonFields


class TextFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: Any = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(msgspec.Struct, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(msgspec.Struct, forbid_unknown_fields=True):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None  # the older name of `summary`
    context: str | None = None
    mode: str | None = None


class ResponseStreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None  # accepted, ignored


class FunctionTool(msgspec.Struct, forbid_unknown_fields=True, rename={"adapter": "x-adapter", "is_async": "async"}):
    """A function that may be called; an entry of `tools`."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    adapter: str | None = None
    # Known names that are refused when they ask for something.
    is_async: bool | None = None
    allowed_callers: list[str] | None = None
    defer_loading: bool | None = None
    output_schema: dict[str, Any] | None = None


class ResponsesRequest(CommonFields, kw_only=True):
    """Body of /v1/responses."""

    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: int | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: dict[str, str] | None = None
    # Accepted, without effect on the output.
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    max_tool_calls: int | None = None  # of tools that a server runs itself, and there are none
    # Known names that are refused when they ask for something.
    background: bool | None = None
    background_options: Any = None
    truncation: str | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None
    image: Any = None
    access_programs: Any = None
    # This server's own, as in a chat request.
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None


# Fields that a chat request has under the same name and with the same meaning.
AS_IN_CHAT = (
    *CommonFields.__struct_fields__, "parallel_tool_calls", "chat_template_kwargs", "include_reasoning",
)  # fmt: skip

# Field -> values that ask for nothing; anything else is refused as not supported.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "background_options": ({},),
    "truncation": ("disabled",),
    "conversation": (),
    "prompt": (),
    "context_management": ([],),
    "moderation": (),
    "image": ({},),
    "access_programs": ({},),
}
UNSERVED_TOOL: dict[str, tuple[Any, ...]] = {
    "is_async": (False,),
    "allowed_callers": (["direct"],),
    "defer_loading": (False,),
    "output_schema": (),
}
UNSERVED_REASONING: dict[str, tuple[Any, ...]] = {
    "summary": ("auto",),  # as much of one as there is: the reasoning itself is in the item's content
    "generate_summary": ("auto",),
    "context": ("auto",),
    "mode": ("standard",),
}
