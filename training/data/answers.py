"""An assistant's message that is to be learned, and what of it stands in a text that a chat template made.

Owns the pieces of a message that must not be lost. Templates trim, so space does not count.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...chat.thinking_marks import ThinkingMarks
from ...chat.tools.prompt import ChatMessage
from ...text.hidden_chat import Marks

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # one thing under three names, by template


@dataclass(frozen=True, slots=True)
class Answer:
    """An assistant's message as `chat.messages.chat_messages` makes it, and the reasoning before it."""

    message: ChatMessage
    reasoning: str | None = None

    @property
    def calls(self) -> list[dict[str, Any]]:
        return self.message.get("tool_calls", [])

    def pieces(self) -> Iterator[tuple[str, str]]:
        """(name, text) of all that the template must write; arguments as JSON writes them."""
        if self.reasoning:
            yield "reasoning", self.reasoning
        if self.message["content"]:
            yield "content", self.message["content"]
        for call in self.calls:
            yield "tool_calls", call["function"]["name"]
            for text in _texts(call["function"]["arguments"]):
                yield "tool_calls", json.dumps(text, ensure_ascii=False)[1:-1]

    def stand_in(self) -> Answer:
        """The same kind of message with texts that stand nowhere else."""
        message = {**self.message, "content": unique() if self.message["content"] else ""}
        if self.calls:
            message["tool_calls"] = [
                {**call, "function": {"name": unique(), "arguments": {unique(): unique()}}} for call in self.calls
            ]
        return Answer(message, unique() if self.reasoning else None)


def missing(answer: Answer, rendered: str, marks: Marks) -> str | None:
    """What of the answer stands nowhere in `rendered`, space aside: templates trim."""
    shown = _without_space("".join(text for text, _ in marks.parts(rendered)))
    return next((name for name, text in answer.pieces() if _without_space(text) not in shown), None)


def apart(answer: Answer, block: ThinkingMarks) -> Answer:
    """`answer` with the thoughts that its text begins with as its reasoning."""
    parts = None if answer.reasoning else block.split(answer.message["content"])
    return answer if parts is None else Answer({**answer.message, "content": parts[1]}, parts[0] or None)


def unique() -> str:
    """A text that stands nowhere else."""
    return secrets.token_hex(16)


def _without_space(text: str) -> str:
    return "".join(text.split())


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
