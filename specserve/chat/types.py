"""A conversation's messages as clients send them and training rows hold them, and what a request says beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import msgspec


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None  # what clients echo of earlier answers
    annotations: list[Any] | None = None
    reasoning_content: str | None = None  # the template decides what becomes of it
    reasoning: str | None = None  # vLLM's name for the same
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None


class Conversation(Protocol):
    """The fields of a request that say how its conversation becomes a prompt."""

    @property
    def messages(self) -> Sequence[Message] | None: ...
    @property
    def add_generation_prompt(self) -> bool | None: ...
    @property
    def continue_final_message(self) -> bool | None: ...


class ToolFields(Protocol):
    """The fields of a request that offer tools."""

    @property
    def tools(self) -> list[Any] | None: ...
    @property
    def tool_choice(self) -> Any: ...
    @property
    def parallel_tool_calls(self) -> bool | None: ...
