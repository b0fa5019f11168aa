"""One choice's tool calls in OpenAI's shapes: a message's `tool_calls`, and a chunk's delta.

Owns ids and indices. The same parser feeds both, so a stream joins to the whole answer.
"""

from __future__ import annotations

from typing import Any

from .events import Arguments, CallStart, Content, Event
from .plan import ToolPlan


class ToolAnswer:
    """Feed it a choice's text; `delta` gives what came since the last feed, `message` everything."""

    def __init__(self, plan: ToolPlan):
        self._format = plan.format
        self._parser = plan.parser()
        self.new: list[Event] = []  # since the last feed
        self._content = ""
        self._calls: list[dict[str, Any]] = []

    @property
    def is_called(self) -> bool:
        """Whether there are calls, and the last was not cut off by a stop string."""
        return bool(self._calls) and self._parser.is_whole

    def feed(self, text: str, final: bool) -> None:
        self.new = self._parser.push(text)
        if final:
            self.new += self._parser.finish()
        for event in self.new:
            if isinstance(event, Content):
                self._content += event.text
            elif isinstance(event, CallStart):
                function = {"name": event.name, "arguments": ""}
                self._calls.append({"id": self._format.call_id(), "type": "function", "function": function})
            elif isinstance(event, Arguments):
                self._calls[event.index]["function"]["arguments"] += event.text

    def call_id(self, index: int) -> str:
        call_id: str = self._calls[index]["id"]
        return call_id

    def message(self) -> dict[str, Any]:
        """The fields of the whole message."""
        if not self._calls:
            return {"content": self._content}
        return {"content": self._content or None, "tool_calls": self._calls}

    def delta(self) -> dict[str, Any]:
        """The fields of a chunk's delta; a call's first entry has its id, type and name. Empty when nothing came."""
        delta: dict[str, Any] = {}
        calls: list[dict[str, Any]] = []
        for event in self.new:
            if isinstance(event, Content):
                delta["content"] = delta.get("content", "") + event.text
            elif isinstance(event, CallStart):
                call = self._calls[event.index]
                function = {"name": event.name, "arguments": ""}
                calls.append({"index": event.index, "id": call["id"], "type": "function", "function": function})
            elif isinstance(event, Arguments) and calls and calls[-1]["index"] == event.index:
                calls[-1]["function"]["arguments"] += event.text
            elif isinstance(event, Arguments):
                calls.append({"index": event.index, "function": {"arguments": event.text}})
        if calls:
            delta["tool_calls"] = calls
        return delta
