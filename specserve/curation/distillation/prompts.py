"""Rows of the trainer's formats as prompts: what stands before the answer, and the answer as a reference, if any.

A row may lack its answer. What a teacher cannot be asked is refused by file, line and field.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...training.data.open_rows import with_answer
from ...training.data.row_messages import Conversation, read_conversation
from ...training.data.rows import parse_object, row_texts


@dataclass(frozen=True, slots=True)
class Prompt:
    """`conversation` ends with the message to be answered; `line` is 1-based."""

    messages: tuple[dict[str, Any], ...]
    reference: str | None
    line: int

    @property
    def text(self) -> str:
        """What of it is compared with held-out rows."""
        return "\n".join(message["content"] for message in self.messages if message["role"] != "system")

    def asked(self, system: str | None) -> tuple[dict[str, Any], ...]:
        """The messages for a teacher, with `system` before those that have no system message of their own."""
        if system is None:
            return self.messages
        return tuple(Conversation(list(self.messages)).with_system(system).messages)

    def row(self, answer: str) -> dict[str, Any]:
        """A training row with `answer`, the only one that is learned."""
        before = [
            {**message, "weight": 0} if message["role"] == "assistant" else dict(message) for message in self.messages
        ]
        return {"messages": [*before, {"role": "assistant", "content": answer}]}


def read_prompts(path: Path, max_rows: int | None = None) -> list[Prompt]:
    """The prompts of a JSONL file in order. Raises `UserError` that names the file, the line and the field."""
    prompts = [
        _prompt(parse_object(text, f"{path} line {line}"), line, f"{path} line {line}")
        for line, text in islice(row_texts(path), max_rows)
    ]
    if not prompts:
        raise UserError(f"{path} holds no rows", param="data")
    return prompts


def _prompt(value: dict[str, Any], line: int, where: str) -> Prompt:
    filled = with_answer(value)
    conversation = read_conversation(filled or value, where)
    messages = conversation.messages
    if conversation.tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages):
        raise UserError(f"{where}: tools are not asked of a teacher; leave such rows out", param="data")
    if conversation.reasoning.keys() - {len(messages) - 1}:
        raise UserError(f"{where}: reasoning in earlier answers is not told to a teacher; leave it out", param="data")
    return Prompt(tuple(messages[:-1]), None if filled else messages[-1]["content"], line)
