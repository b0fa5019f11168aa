"""Rows that lack their answer: prompts, which something else than the row answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .row_messages import ROLE_NAMES

_ABSENT = "?"  # stands for an answer while the row is read
_PAIRS = (("prompt", ("completion",)), ("instruction", ("output", "response")))
_LISTS = (("messages", "role", "content", "assistant"), ("conversations", "from", "value", "gpt"))


def with_answer(value: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row with a stand-in for the answer that it lacks; None where it lacks none, or is no row at all."""
    for field, role, text, answerer in _LISTS:
        turns = value.get(field)
        if turns is not None:
            if not isinstance(turns, list) or not turns or not isinstance(turns[-1], dict):
                return None
            if ROLE_NAMES.get(str(turns[-1].get(role))) == "assistant":
                return None
            return {**value, field: [*turns, {role: answerer, text: _ABSENT}]}
    for question, answers in _PAIRS:
        if question in value:
            if any(value.get(answer) not in (None, "") for answer in answers):
                return None
            return {**value, answers[0]: _ABSENT}
    return None
