"""Conversations with tools as the chat template takes them.

Owns the check of `tool_calls` and tool messages, and two ways to write them: as the structures that a template which
renders tools expects, or as text of the Hermes format in plain system, user and assistant messages, for every other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ...errors import UserError
from ...strict_json import decode_json
from ..types import Message
from .definitions import MAX_TOOLS, Tool
from .formats import HERMES, ChosenFormat

MAX_CALL_ID_LEN = 256
ChatMessage = dict[str, Any]
_INSTRUCTIONS = """You can call functions. Each line between <tools> and </tools> describes one:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as JSON between <tool_call> and </tool_call>, one pair for a call:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument": "its value"}}}}
</tool_call>
What a call returned is shown to you between <tool_response> and </tool_response>."""


def tool_calls(message: Message, where: str) -> list[dict[str, Any]]:
    """The calls that an assistant message made, with their arguments as objects. Raises `UserError`."""
    calls = message.tool_calls or []
    if len(calls) > MAX_TOOLS:
        raise UserError(f"{where}.tool_calls has {len(calls)} calls; at most {MAX_TOOLS} are allowed", param=where)
    return [_call(call, f"{where}.tool_calls[{idx}]") for idx, call in enumerate(calls)]


def answered_call(message: Message, earlier: Sequence[ChatMessage], where: str) -> dict[str, Any]:
    """What a tool message answers: `tool_call_id` and the function's name. `earlier` are the messages before it."""
    call_id = message.tool_call_id
    if not call_id:
        raise UserError(f"{where}.tool_call_id is missing", param=f"{where}.tool_call_id")
    asked = next((item for item in reversed(earlier) if item["role"] != "tool"), None)
    calls = asked.get("tool_calls", []) if asked is not None else []
    name = next((call["function"]["name"] for call in calls if call["id"] == call_id), None)
    if name is None:
        raise UserError(
            f"{where}.tool_call_id {call_id[:64]!r} answers no tool call of the assistant message before it",
            param=f"{where}.tool_call_id",
        )
    return {"tool_call_id": call_id, "name": name}


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise UserError(f"{where} must be {{'id', 'type': 'function', 'function': {{...}}}}", param=where)
    call_id, name, text = call.get("id"), function.get("name"), function.get("arguments")
    if not isinstance(call_id, str) or not 1 <= len(call_id) <= MAX_CALL_ID_LEN:
        raise UserError(f"{where}.id must be text of 1 to {MAX_CALL_ID_LEN} characters", param=f"{where}.id")
    if not isinstance(name, str) or not name:
        raise UserError(f"{where}.function.name must be text", param=f"{where}.function.name")
    arguments = call_arguments(text, f"{where}.function.arguments")
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def call_arguments(text: Any, where: str) -> dict[str, Any]:
    """A call's arguments out of their JSON text. Raises `UserError`."""
    try:
        arguments = decode_json(text.encode()) if isinstance(text, str) else None
    except (UserError, UnicodeEncodeError):
        arguments = None
    if not isinstance(arguments, dict):
        raise UserError(f"{where} must be the JSON text of an object", param=where)
    return arguments


def for_template(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], chosen: ChosenFormat
) -> tuple[list[ChatMessage], list[dict[str, Any]] | None]:
    """(messages, tools) to render with the template that `chosen` was found for."""
    definitions = [tool.definition(described=chosen.native and chosen.describes) for tool in tools]
    messages = [_with_thoughts(message, chosen.thoughts) for message in messages]
    if chosen.native and (definitions or not chosen.if_offered):
        return [_with_template_ids(message, chosen) for message in messages], definitions or None
    return _plain(messages, definitions, chosen), None


def _with_thoughts(message: ChatMessage, name: str) -> ChatMessage:
    """What the message thought, under the name by which the template reads it."""
    return {name if key == "reasoning_content" else key: value for key, value in message.items()}


def _with_template_ids(message: ChatMessage, chosen: ChosenFormat) -> ChatMessage:
    message = dict(message)
    if "tool_call_id" in message:
        message["tool_call_id"] = chosen.format.template_id(message["tool_call_id"])
    if "tool_calls" in message:
        message["tool_calls"] = [
            {**call, "id": chosen.format.template_id(call["id"])} for call in message["tool_calls"]
        ]
    return message


def _plain(
    messages: Sequence[ChatMessage], definitions: Sequence[dict[str, Any]], chosen: ChosenFormat
) -> list[ChatMessage]:
    """Calls, results and definitions as text; results of one turn are one user message.

    Definitions stand in the system message; in the user's where the template has none.
    """
    result: list[ChatMessage] = []
    text = ""
    if definitions:
        text = _INSTRUCTIONS.format(tools="\n".join(json.dumps(item, ensure_ascii=False) for item in definitions))
        result.append({"role": "system", "content": text})
    after_tool = False
    for message in messages:
        is_tool = message["role"] == "tool"
        content = message["content"]
        if is_tool:
            content = f"<tool_response>\n{content}\n</tool_response>"
        for call in message.get("tool_calls", ()):
            function = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
            written = f"{HERMES.marker}\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>"
            content = f"{content}\n{written}" if content else written
        role = "user" if is_tool else message["role"]
        if is_tool and after_tool:
            result[-1]["content"] += "\n" + content
        elif role == "system" and definitions and len(result) == 1:
            result[0]["content"] = f"{content}\n\n{result[0]['content']}"
        elif role == "user" and not chosen.has_system and [text] == [item["content"] for item in result]:
            result[0] = {"role": "user", "content": f"{text}\n\n{content}"}
        else:
            thoughts = {key: message[key] for key in (chosen.thoughts,) if key in message}
            result.append({"role": role, "content": content, **thoughts})
        after_tool = is_tool
    return result
