"""The tools of a request and which of them may be called: `tools`, `tool_choice` and `parallel_tool_calls`, checked.

Owns their shapes and limits; each error names the field. Whether a schema can be enforced is said by
`schema_problem`; which schemas must be is decided in `plan`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
from llguidance import LLMatcher

from ...errors import UserError
from ...grammar.json_schema import prepare
from ..types import ToolFields

MAX_TOOLS = 128
MAX_NAME_LEN = 64
MAX_DESCRIPTION_LEN = 16 * 1024
MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 40  # of brackets
ADAPTER_KEY = "x-adapter"
_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_NAME_LEN}}}")
_CHOICES = (
    "none, auto, required, {'type': 'function', 'function': {'name': ...}}, or {'type': 'allowed_tools', "
    "'allowed_tools': {'mode': ..., 'tools': [...]}}"
)


@dataclass(frozen=True, slots=True)
class Tool:
    """One function. `schema` is the JSON Schema of its arguments, always of type object."""

    name: str
    description: str | None
    schema: dict[str, Any]
    strict: bool
    adapter: str | None
    has_schema: bool

    def definition(self, described: bool = False) -> dict[str, Any]:
        """What the prompt shows of it; `described`: with an empty description where it has none."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None or described:
            function["description"] = self.description or ""
        function["parameters"] = self.schema if self.has_schema else {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools are offered, and what the answer must do with them."""

    tools: tuple[Tool, ...]
    mode: Literal["auto", "required", "named"]
    parallel: bool


def tool_use(request: ToolFields) -> ToolUse | None:
    """The tools that `request` offers; None when the answer cannot call any. Raises `UserError`."""
    tools = all_tools(request.tools)
    choice, allowed = _allowed(request.tool_choice)
    if choice is None:
        choice = "auto" if tools else "none"
    named = _named(choice)
    if not tools:
        if choice in ("none", "auto"):
            return None
        raise UserError("tool_choice asks for a call but there are no tools; send tools", param="tool_choice")
    if choice == "none":
        return None
    for name in [*allowed, *([] if named is None else [named])]:
        if name not in {tool.name for tool in tools}:
            raise UserError(f"tool_choice names {name[:64]!r}, which is not one of the tools", param="tool_choice")
    if allowed:
        tools = tuple(tool for tool in tools if tool.name in allowed)
    parallel = request.parallel_tool_calls is not False
    if named is None:
        return ToolUse(tools, "auto" if choice == "auto" else "required", parallel)
    return ToolUse(tuple(tool for tool in tools if tool.name == named), "named", False)


def schema_problem(schema: dict[str, Any]) -> str | None:
    """Why arguments cannot be held to `schema`; None when they can."""
    try:
        prepared = prepare(msgspec.json.decode(msgspec.json.encode(schema)))
        source = LLMatcher.grammar_from_json_schema(msgspec.json.encode(prepared).decode())
    except (UserError, ValueError) as error:
        return str(error)
    failed, messages = LLMatcher.validate_grammar_with_warnings(source)
    return " ".join(messages[0].split())[:300] if failed else None


def all_tools(value: list[Any] | None) -> tuple[Tool, ...]:
    """Every tool of the field `tools`, those that cannot be called included: what the prompt shows."""
    items = value or []
    if len(items) > MAX_TOOLS:
        raise UserError(f"tools has {len(items)} entries; at most {MAX_TOOLS} are allowed", param="tools")
    tools = tuple(_tool(item, f"tools[{idx}]") for idx, item in enumerate(items))
    seen: set[str] = set()
    for idx, tool in enumerate(tools):
        if tool.name in seen:
            raise UserError(f"two tools are named {tool.name!r}; names must differ", param=f"tools[{idx}]")
        seen.add(tool.name)
    return tools


def _tool(item: Any, where: str) -> Tool:
    if not isinstance(item, dict) or item.get("type") != "function" or not isinstance(item.get("function"), dict):
        raise UserError(f"{where} must be {{'type': 'function', 'function': {{...}}}}", param=where)
    function = dict(item["function"])
    _no_more(item, {"type", "function", ADAPTER_KEY}, where)
    where_function = f"{where}.function"
    _no_more(function, {"name", "description", "parameters", "strict", ADAPTER_KEY}, where_function)
    name, description = function.get("name"), function.get("description")
    strict, parameters = function.get("strict"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UserError(
            f"{where_function}.name is {str(name)[:64]!r}; 1 to {MAX_NAME_LEN} letters, digits, '_' and '-' are "
            "allowed",
            param=f"{where_function}.name",
        )
    if not isinstance(description, str | None) or len(description or "") > MAX_DESCRIPTION_LEN:
        raise UserError(
            f"{where_function}.description must be text of at most {MAX_DESCRIPTION_LEN} characters",
            param=f"{where_function}.description",
        )
    if not isinstance(strict, bool | None):
        raise UserError(f"{where_function}.strict must be true or false", param=f"{where_function}.strict")
    schema = _schema(parameters, f"{where_function}.parameters")
    adapter = _adapter(item, function, where)
    return Tool(name, description, schema, bool(strict), adapter, parameters is not None)


def _schema(parameters: Any, where: str) -> dict[str, Any]:
    if parameters is None:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise UserError(f"{where} must be a JSON Schema of type object", param=where)
    num_bytes = len(msgspec.json.encode(parameters))
    if num_bytes > MAX_SCHEMA_BYTES:
        raise UserError(f"{where} has {num_bytes} bytes; at most {MAX_SCHEMA_BYTES} are allowed", param=where)
    if (depth := _depth(parameters)) > MAX_SCHEMA_DEPTH:
        raise UserError(f"{where} is nested {depth} deep; at most {MAX_SCHEMA_DEPTH} are allowed", param=where)
    return {"type": "object", **parameters}


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max((_depth(item) for item in value.values()), default=0)
    if isinstance(value, list):
        return 1 + max((_depth(item) for item in value), default=0)
    return 0


def _adapter(item: dict[str, Any], function: dict[str, Any], where: str) -> str | None:
    names = [value for value in (item.get(ADAPTER_KEY), function.get(ADAPTER_KEY)) if value not in (None, "")]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: {ADAPTER_KEY} must be an adapter's name", param=f"{where}.{ADAPTER_KEY}")
    if len(set(names)) > 1:
        raise UserError(f"{where} names two adapters; name one", param=f"{where}.{ADAPTER_KEY}")
    return names[0] if names else None


def _named(choice: Any) -> str | None:
    """The function that `tool_choice` names, None for the words none, auto and required."""
    if isinstance(choice, str) and choice in ("none", "auto", "required"):
        return None
    if isinstance(choice, dict) and set(choice) == {"type", "function"} and choice["type"] == "function":
        function = choice["function"]
        if isinstance(function, dict) and set(function) == {"name"} and isinstance(function["name"], str):
            return function["name"]
    raise UserError(f"tool_choice is {str(choice)[:100]!r}; served are {_CHOICES}", param="tool_choice")


def _allowed(choice: Any) -> tuple[Any, list[str]]:
    """(the choice, the tools that it is limited to; none: all of them)."""
    if not isinstance(choice, dict) or choice.get("type") != "allowed_tools":
        return choice, []
    fields = choice.get("allowed_tools")
    if set(choice) == {"type", "allowed_tools"} and isinstance(fields, dict) and set(fields) == {"mode", "tools"}:
        mode, tools = fields["mode"], fields["tools"]
        if mode in ("auto", "required") and isinstance(tools, list) and tools:
            names = [_named(tool) if isinstance(tool, dict) else None for tool in tools]
            if None not in names:
                return mode, [name for name in names if name is not None]
    raise UserError(f"tool_choice is {str(choice)[:100]!r}; served are {_CHOICES}", param="tool_choice")


def _no_more(fields: dict[str, Any], known: set[str], where: str) -> None:
    for name in fields:
        if name not in known:
            raise UserError(f"unknown field '{where}.{name[:64]}'", param=f"{where}.{name[:64]}")
