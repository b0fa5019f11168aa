"""Thinking blocks: what a model says to itself between <think> and </think>, told from its answer as it comes.

Owns one choice's text. However it is cut into pieces, the joined parts are the same: no half of a marker leaks, and
white space around the block belongs to neither side. A tool call ends a block too, whether it was closed or not.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from .markers import overlap

THINK, THINK_END = "<think>", "</think>"
MAX_SPACE = 64  # characters of white space that are waited for
Phase = Literal["open", "thinking", "answer"]  # open: it may begin to think, or not


@dataclass(frozen=True, slots=True)
class Thinking:
    """That an answer may think. `is_open`: the prompt has opened the block; `other_ends` end it beside its marker."""

    is_open: bool
    other_ends: tuple[str, ...] = ()


def may_think(template: object, added_tokens: Collection[str]) -> bool:
    """Whether answers to this template's prompts may have a block: it writes the markers, or they are tokens."""
    text = str(template)
    return (THINK in text and THINK_END in text) or {THINK, THINK_END} <= set(added_tokens)


class _State(enum.Enum):
    START = enum.auto()  # a block may begin
    INSIDE = enum.auto()
    BEHIND = enum.auto()  # white space behind the block
    CONTENT = enum.auto()


class ThinkingParser:
    """`feed` text as it comes; gives (reasoning, content)."""

    def __init__(self, thinking: Thinking):
        self._state = _State.INSIDE if thinking.is_open else _State.START
        self._ends: Sequence[str] = (THINK_END, *thinking.other_ends)
        self._buffer = ""
        self._space = ""  # within the block: reasoning unless the block ends here
        self._has_reasoning = False

    @property
    def phase(self) -> Phase:
        """What the text so far is; thinking lasts until the answer's first character."""
        if self._state is _State.START:
            return "open"
        return "answer" if self._state is _State.CONTENT else "thinking"

    def feed(self, text: str, final: bool) -> tuple[str, str]:
        self._buffer += text
        if self._state is _State.START:
            self._start(final)
        reasoning = self._inside(final) if self._state is _State.INSIDE else ""
        if self._state is _State.BEHIND:
            self._buffer = self._buffer.lstrip()
            if self._buffer:
                self._state = _State.CONTENT
        content = ""
        if self._state is _State.CONTENT:
            content, self._buffer = self._buffer, ""
        return reasoning, content

    def _start(self, final: bool) -> None:
        text = self._buffer.lstrip()
        if text.startswith(THINK):
            self._buffer, self._state = text[len(THINK) :], _State.INSIDE
        elif final or not THINK.startswith(text) or len(self._buffer) > MAX_SPACE:
            self._state = _State.CONTENT

    def _inside(self, final: bool) -> str:
        found = [(idx, end) for end in self._ends if (idx := self._buffer.find(end)) >= 0]
        if found:
            idx, end = min(found)
            text, self._buffer = self._buffer[:idx], self._buffer[idx:].removeprefix(THINK_END)
            self._state = _State.BEHIND if end == THINK_END else _State.CONTENT
        else:
            held = 0 if final else max(overlap(self._buffer, end) for end in self._ends)
            length = len(self._buffer) - held
            text, self._buffer = self._buffer[:length], self._buffer[length:]
        if not self._has_reasoning:
            text = text.lstrip()
        self._has_reasoning = self._has_reasoning or bool(text)
        text = self._space + text
        kept = text.rstrip()
        if len(text) - len(kept) > MAX_SPACE and not found:
            kept = text
        self._space = text[len(kept) :]
        return kept
