"""From /v1/responses to the fields of /v1/chat/completions, and errors of those back into the words of the request.

Prompts, sampling, grammars and tools are the chat route's: the same conversation gives the same tokens. What OpenAI has
and this server has not is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from ...chat.tools.definitions import ADAPTER_KEY
from ...chat.types import Message
from ...errors import UserError, from_info
from ..openai.conversion import refuse_trace, refuse_unserved
from ..openai.request_types import ChatRequest
from .input_items import Item, converted, messages_of
from .request_types import (
    AS_IN_CHAT,
    UNSERVED,
    UNSERVED_REASONING,
    UNSERVED_TOOL,
    FunctionTool,
    ReasoningOptions,
    ResponsesRequest,
    TextFormat,
)

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")  # reasoning is not encrypted: it is in the items as it is
_CHOICES = (
    "none, auto, required, {'type': 'function', 'name': ...}, or {'type': 'allowed_tools', 'mode': ..., 'tools': [...]}"
)

# In messages of errors: what chat calls it -> what it is called here.
_RENAMED = (
    (re.compile(r"\bmax_completion_tokens\b"), "max_output_tokens"),
    (re.compile(r"\bresponse_format(\.json_schema)?\b"), "text.format"),
    (re.compile(r"\breasoning_effort\b"), "reasoning.effort"),
    (re.compile(r"(\btools\[\d+\])\.function\b"), r"\1"),
)
# The same for words that are too common to be replaced where the error is of something else.
_RENAMED_PARAMS = {"verbosity": "text.verbosity", "messages": "input", "prompt": "input"}


def input_items(request: ResponsesRequest) -> list[Item]:
    """The request's own items. Raises `UserError` where it has none and continues nothing."""
    value = request.input
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not value and request.previous_response_id is None:
        raise UserError("input is empty; send a text or at least one item", param="input")
    return list(value or [])


def chat_request(request: ResponsesRequest, items: Sequence[Item], num_earlier: int) -> ChatRequest:
    """The same request in the words of /v1/chat/completions; of `items` the first `num_earlier` are another's."""
    check_served(request)
    messages = [Message("system", request.instructions)] if request.instructions else []
    messages += messages_of(items, num_earlier)
    if not messages:
        raise UserError("input is empty; send a text or at least one item", param="input")
    format = request.text.format if request.text is not None else None
    has_logprobs = LOGPROBS in (request.include or ())
    shared = {name: getattr(request, name) for name in AS_IN_CHAT}
    return ChatRequest(
        **shared,
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        response_format=None if format is None else _response_format(format),
        verbosity=request.text.verbosity if request.text is not None else None,
        reasoning_effort=request.reasoning.effort if request.reasoning is not None else None,
        logprobs=has_logprobs or None,
        top_logprobs=request.top_logprobs if has_logprobs else None,
        tools=[_chat_tool(tool) for tool in function_tools(request)] or None,
        tool_choice=_chat_tool_choice(request.tool_choice),
    )


def check_served(request: ResponsesRequest) -> None:
    """Refuse, by name, what this server has not."""
    refuse_unserved(request, UNSERVED)
    refuse_trace(request.speculation, "responses", "/v1/chat/completions")
    reasoning = request.reasoning or ReasoningOptions()
    for name, values in UNSERVED_REASONING.items():
        if (value := getattr(reasoning, name)) is not None and value not in values:
            raise UserError(
                f"reasoning.{name} is {value[:64]!r}; served is {values[0]}", param=f"reasoning.{name}",
                code="unsupported",
            )  # fmt: skip
    for idx, name in enumerate(request.include or ()):
        if name not in INCLUDABLE:
            raise UserError(
                f"include[{idx}] is {name[:64]!r}; served are {', '.join(INCLUDABLE)}", param="include",
                code="unsupported",
            )  # fmt: skip
    if request.top_logprobs and LOGPROBS not in (request.include or ()):
        raise UserError(f"top_logprobs needs include: [{LOGPROBS!r}]", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise UserError("stream_options needs stream=true", param="stream_options")


def function_tools(request: ResponsesRequest) -> list[FunctionTool]:
    """The request's tools, of which all must be functions."""
    tools = []
    for idx, fields in enumerate(request.tools or ()):
        where = f"tools[{idx}]"
        given = {name: value for name, value in fields.items() if value is not None}
        if "type" not in given:
            raise UserError(f"{where} has no type; served is function", param=f"{where}.type")
        if given["type"] != "function":
            raise UserError(
                f"{where}.type is {str(given['type'])[:64]!r}; served is function", param=f"{where}.type",
                code="unsupported",
            )  # fmt: skip
        if "function" in given:
            raise UserError(
                f"{where}.function is how /v1/chat/completions has it; here name, description and parameters stand "
                "beside type",
                param=f"{where}.function",
            )
        tool = converted(given, FunctionTool, where)
        for name, values in UNSERVED_TOOL.items():
            if (value := getattr(tool, name)) is not None and value not in values:
                name = name.removeprefix("is_")
                raise UserError(
                    f"'{where}.{name}' is not supported by this server; leave it out", param=f"{where}.{name}",
                    code="unsupported",
                )  # fmt: skip
        tools.append(tool)
    return tools


def in_these_words(error: UserError) -> UserError:
    """An error of the chat request that was made of a request, with the names that the request has."""
    info = error.info()
    message, param = info.message, info.param or ""
    for pattern, name in _RENAMED:
        message, param = pattern.sub(name, message), pattern.sub(name, param)
    if (name := _RENAMED_PARAMS.get(param, "")) and param != "prompt":  # a prompt is one here, too
        message = re.sub(rf"\b{param}\b", name, message)
    param = name or param
    return from_info(msgspec.structs.replace(info, message=message, param=param or None))


def _response_format(format: TextFormat) -> dict[str, Any]:
    if format.type != "json_schema":
        for name in ("name", "schema", "strict", "description"):
            if getattr(format, name) is not None:
                raise UserError(
                    f"text.format.{name} goes with type json_schema, not {format.type}", param=f"text.format.{name}"
                )
        return {"type": format.type}
    for name in ("name", "schema"):
        if getattr(format, name) is None:
            raise UserError(f"the field 'text.format.{name}' is required", param=f"text.format.{name}")
    inner = {"name": format.name, "schema": format.schema, "strict": format.strict, "description": format.description}
    return {"type": "json_schema", "json_schema": inner}


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": {**function, "strict": tool.strict, ADAPTER_KEY: tool.adapter}}


def _chat_tool_choice(choice: str | dict[str, Any] | None) -> Any:
    match choice:
        case None | "none" | "auto" | "required":
            return choice
        case {"type": "function", "name": str(name), **rest} if not rest:
            return _chat_function(name)
        case {"type": "allowed_tools", "mode": "auto" | "required" as mode, "tools": [*tools], **rest} if (
            tools and not rest
        ):
            names = [_allowed_name(tool) for tool in tools]
            allowed = {"mode": mode, "tools": [_chat_function(name) for name in names]}
            return {"type": "allowed_tools", "allowed_tools": allowed}
    raise _unserved_choice(choice)


def _allowed_name(tool: Any) -> str:
    match tool:
        case {"type": "function", "name": str(name), **rest} if not rest:
            return name
    raise _unserved_choice(tool)


def _unserved_choice(choice: Any) -> UserError:
    return UserError(
        f"tool_choice is {str(choice)[:100]!r}; served are {_CHOICES}", param="tool_choice", code="unsupported"
    )


def _chat_function(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}
