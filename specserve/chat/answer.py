"""One choice's text as a message, and as the deltas that join to it: thinking, content and tool calls apart."""

from __future__ import annotations

from typing import Any

from .reasoning import Phase, Thinking, ThinkingParser
from .tools.answer import ToolAnswer
from .tools.events import Content, Event, Reasoning
from .tools.plan import ToolPlan


class ChatAnswer:
    """Feed it a choice's text; `delta` and `events` give what came since the last feed, `message` everything."""

    def __init__(self, plan: ToolPlan | None, thinking: Thinking | None, include_reasoning: bool):
        self._tools = None if plan is None else ToolAnswer(plan)
        self._thinking = None if thinking is None else ThinkingParser(thinking)
        self._include_reasoning = include_reasoning
        self._reasoning = self._content = ""
        self._new_reasoning = self._new_content = ""

    @property
    def is_called(self) -> bool:
        """Whether there are tool calls, and the last was not cut off by a stop string."""
        return self._tools is not None and self._tools.is_called

    def finish_reason(self, ended_by: str | None) -> str | None:
        """What the APIs say of an output that `ended_by`: one that stops with calls stopped for them."""
        return "tool_calls" if ended_by == "stop" and self.is_called else ended_by

    @property
    def phase(self) -> Phase:
        return "answer" if self._thinking is None else self._thinking.phase

    def feed(self, text: str, final: bool) -> None:
        reasoning, content = ("", text) if self._thinking is None else self._thinking.feed(text, final)
        self._new_reasoning = reasoning if self._include_reasoning else ""
        self._new_content = content
        self._reasoning += self._new_reasoning
        self._content += content
        if self._tools is not None:
            self._tools.feed(content, final)

    def message(self) -> dict[str, Any]:
        """The fields of the whole message."""
        message: dict[str, Any] = {"content": self._content} if self._tools is None else self._tools.message()
        if self._reasoning:
            message = {**message, "content": message["content"] or None, **_named(self._reasoning)}
        return message

    def delta(self) -> dict[str, Any]:
        """The fields of a chunk's delta; empty when nothing came."""
        if self._tools is not None:
            delta = self._tools.delta()
        else:
            delta = {"content": self._new_content} if self._new_content else {}
        return {**_named(self._new_reasoning), **delta} if self._new_reasoning else delta

    def events(self) -> list[Event]:
        """The same as events, in the order of the text."""
        events: list[Event] = [Reasoning(self._new_reasoning)] if self._new_reasoning else []
        if self._tools is not None:
            return events + self._tools.new
        return [*events, Content(self._new_content)] if self._new_content else events

    def call_id(self, index: int) -> str:
        """The id of a call that has been announced."""
        assert self._tools is not None
        return self._tools.call_id(index)


def _named(reasoning: str) -> dict[str, str]:
    """Under both of its names: DeepSeek's, which most clients read, and the one that vLLM has now."""
    return {"reasoning_content": reasoning, "reasoning": reasoning}
