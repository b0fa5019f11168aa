"""Items of /v1/responses as messages of a chat: what was said, thought and called, and what calls returned.

Owns the shapes of items. A chat has one assistant message where a response has several items: reasoning, text and calls
that follow each other are one, so a response that is sent back is the message that the chat route would have answered.
A null says nothing in any field, since clients send items back with all of their fields.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from ...chat.tools.definitions import MAX_TOOLS
from ...chat.tools.prompt import MAX_CALL_ID_LEN, call_arguments
from ...chat.types import Message
from ...errors import UserError
from ..http_body import convert

Item = Mapping[str, Any]
MAX_ITEMS = 8192


class MessageInput(msgspec.Struct, forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[dict[str, Any]]
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class ReasoningInput(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["reasoning"]
    content: list[dict[str, Any]] = []
    summary: list[dict[str, Any]] = []
    encrypted_content: str | None = None
    id: str | None = None
    status: str | None = None


class CallInput(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class OutputInput(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[dict[str, Any]]
    name: str | None = None
    id: str | None = None
    status: str | None = None


KINDS: dict[str, Any] = {
    "message": MessageInput,
    "reasoning": ReasoningInput,
    "function_call": CallInput,
    "function_call_output": OutputInput,
}
TEXT_PARTS = {  # type -> (where its text is, what else it may say)
    "input_text": ("text", {"prompt_cache_breakpoint"}),
    "output_text": ("text", {"annotations", "logprobs"}),
    "text": ("text", set()),
    "refusal": ("refusal", set()),
}
THOUGHT_PARTS: dict[str, tuple[str, set[str]]] = {"reasoning_text": ("text", set()), "summary_text": ("text", set())}


def messages_of(items: Sequence[Item], first: int = 0) -> list[Message]:
    """The conversation of `items`; errors count those from `first` on, the client's own, as `input`."""
    if len(items) > MAX_ITEMS:
        raise UserError(
            f"the conversation has {len(items)} items, {first} of them of previous_response_id; at most {MAX_ITEMS} "
            "are allowed",
            param="input",
        )
    conversation = _Conversation()
    for idx, item in enumerate(items):
        where = f"input[{idx - first}]" if idx >= first else "an item of previous_response_id"
        conversation.add(_read(item, where), where)
    return conversation.messages


class _Conversation:
    """Messages so far, of which the last may be an assistant's that further items join."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._turn: Message | None = None  # the assistant's, while nobody else has spoken
        self._asked: set[str] = set()  # calls of the assistant's latest message

    def add(self, item: Any, where: str) -> None:
        match item:
            case MessageInput():
                text = _text(item.content, f"{where}.content", TEXT_PARTS)
                if item.role == "assistant":
                    self._said(text)
                else:
                    self._turn, self._asked = None, set()
                    self.messages.append(Message(item.role, text))
            case ReasoningInput():
                self._thought(item, where)
            case CallInput():
                self._called(item, where)
            case OutputInput():
                self._answered(item, where)

    def _open(self, is_new: bool) -> Message:
        if self._turn is None or is_new:
            self._turn, self._asked = Message("assistant"), set()
            self.messages.append(self._turn)
        return self._turn

    def _said(self, text: str) -> None:
        turn = self._turn
        turn = self._open(is_new=turn is not None and turn.content is not None and not turn.tool_calls)
        assert turn.content is None or isinstance(turn.content, str)
        turn.content = (turn.content or "") + text

    def _thought(self, item: ReasoningInput, where: str) -> None:
        thoughts = _text(item.content, f"{where}.content", THOUGHT_PARTS)
        thoughts = thoughts or "\n".join(
            _text([part], f"{where}.summary[{idx}]", THOUGHT_PARTS) for idx, part in enumerate(item.summary)
        )
        if not thoughts and item.encrypted_content:
            raise UserError(
                f"{where}.encrypted_content is of another server, which alone can read it; leave the item out",
                param=f"{where}.encrypted_content",
                code="unsupported",
            )
        if thoughts:
            turn = self._turn
            turn = self._open(is_new=turn is not None and (turn.content is not None or bool(turn.tool_calls)))
            turn.reasoning_content = (turn.reasoning_content or "") + thoughts

    def _called(self, item: CallInput, where: str) -> None:
        if not 1 <= len(item.call_id) <= MAX_CALL_ID_LEN:
            raise UserError(
                f"{where}.call_id has {len(item.call_id)} characters; 1 to {MAX_CALL_ID_LEN} are allowed",
                param=f"{where}.call_id",
            )
        call_arguments(item.arguments, f"{where}.arguments")
        turn = self._open(is_new=False)
        turn.tool_calls = turn.tool_calls or []
        if len(turn.tool_calls) == MAX_TOOLS:
            raise UserError(f"{where} is one call more than the {MAX_TOOLS} that one turn may have", param=where)
        function = {"name": item.name, "arguments": item.arguments}
        turn.tool_calls.append({"id": item.call_id, "type": "function", "function": function})
        self._asked.add(item.call_id)

    def _answered(self, item: OutputInput, where: str) -> None:
        if item.call_id not in self._asked:
            raise UserError(
                f"{where}.call_id {item.call_id[:64]!r} answers no function_call of the turn before it",
                param=f"{where}.call_id",
            )
        self._turn = None  # what the assistant does next, it does with this
        self.messages.append(
            Message("tool", _text(item.output, f"{where}.output", TEXT_PARTS), tool_call_id=item.call_id)
        )


def _read(item: Item, where: str) -> Any:
    fields = {name: value for name, value in item.items() if value is not None}
    kind = fields.get("type", "message" if "role" in fields else None)
    if kind is None:
        message = f"{where} has no type, and no role as a message has; served types are {', '.join(KINDS)}"
        raise UserError(message, param=f"{where}.type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(
            f"{where}.type is {str(kind)[:64]!r}; served are {', '.join(KINDS)}",
            param=f"{where}.type",
            code="unsupported",
        )
    return converted(fields, KINDS[kind], where)


def converted(value: Any, kind: type[Any], where: str) -> Any:
    """`value` as `kind`; errors name the field within `where`."""
    try:
        return convert(value, kind)
    except UserError as error:
        param = f"{where}.{error.param}" if error.param else where
        raise UserError(f"{where}: {error}", param=param) from None


def _text(content: str | Sequence[Item], where: str, parts: Mapping[str, tuple[str, set[str]]]) -> str:
    """All text of a content, which may hold nothing else."""
    if isinstance(content, str):
        return content
    texts = []
    for idx, part in enumerate(content):
        name = f"{where}[{idx}]"
        kind = part.get("type")
        if kind is None:
            raise UserError(f"{name} has no type; served are {', '.join(parts)}", param=f"{name}.type")
        if not isinstance(kind, str) or kind not in parts:
            raise UserError(
                f"{name}.type is {str(kind)[:64]!r}; served are {', '.join(parts)}",
                param=f"{name}.type",
                code="unsupported",
            )
        field, others = parts[kind]
        unknown = [key for key, value in part.items() if value is not None and key not in {"type", field, *others}]
        if unknown:
            raise UserError(f"unknown field '{name}.{unknown[0][:64]}'", param=f"{name}.{unknown[0][:64]}")
        if not isinstance(part.get(field), str):
            raise UserError(f"{name}.{field} must be text", param=f"{name}.{field}")
        texts.append(part[field])
    return "".join(texts)
