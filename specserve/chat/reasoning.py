"""Thinking blocks: what a model says to itself before its answer, told from that as it comes.

Owns one choice's text. However it is cut into pieces, the joined parts are the same: no half of a mark leaks, and
white space around the block belongs to neither side. A tool call ends a block too, whether it was closed or not.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .markers import overlap
from .thinking_marks import ThinkingMarks

MAX_SPACE = 64  # characters of white space around a block that are waited for and left out; more are text
Phase = Literal["open", "thinking", "answer"]  # open: it may begin to think, or not


@dataclass(frozen=True, slots=True)
class Thinking:
    """That an answer may think, in one of the `known` ways. `opened`: in which the prompt has opened the block;
    `other_ends` end it beside its mark."""

    known: tuple[ThinkingMarks, ...]
    opened: ThinkingMarks | None = None
    other_ends: tuple[str, ...] = ()


class _State(enum.Enum):
    START = enum.auto()  # a block may begin
    INSIDE = enum.auto()
    BEHIND = enum.auto()  # white space behind the block, and what else stands between it and the answer
    CONTENT = enum.auto()


class ThinkingParser:
    """`feed` text as it comes; gives (reasoning, content)."""

    def __init__(self, thinking: Thinking):
        self._known = thinking.known
        self._marks = thinking.opened  # of the block that is or was open
        self._state = _State.START if thinking.opened is None else _State.INSIDE
        self._other_ends = thinking.other_ends
        self._has_begun = thinking.opened is not None
        self._is_answer = False  # its own mark has been read
        self._may_repeat = thinking.opened is not None  # models write a mark again that the prompt has written
        self._buffer = ""
        self._space = ""  # within the block: reasoning unless the block ends here
        self._has_reasoning = False

    @property
    def phase(self) -> Phase:
        """What the text so far is; thinking lasts until the answer's first character."""
        if self._state is _State.CONTENT:
            return "answer"
        return "thinking" if self._has_begun else "open"

    def feed(self, text: str, final: bool) -> tuple[str, str]:
        self._buffer += text
        reasoning = ""
        while self._state is not _State.CONTENT:
            before = self._state
            if before is _State.START:
                self._start(final)
            elif before is _State.INSIDE:
                reasoning += self._inside(final)
            else:
                self._behind(final)
            if self._state is before:
                break
        return reasoning, self._content(final) if self._state is _State.CONTENT else ""

    def _start(self, final: bool) -> None:
        """A block begins, or an answer; white space before either is the answer's, if no mark follows."""
        text = self._buffer.lstrip()
        if len(self._buffer) - len(text) > MAX_SPACE:
            self._state = _State.CONTENT
            return
        for marks in self._known:
            if text.startswith(marks.start):
                self._buffer = text[len(marks.start) :]
                self._marks, self._has_begun, self._state = marks, True, _State.INSIDE
                return
            if marks.answer_start and text.startswith(marks.answer_start):
                self._buffer = text[len(marks.answer_start) :]
                self._marks, self._is_answer, self._state = marks, True, _State.BEHIND
                return
        starts = [start for marks in self._known for start in (marks.start, marks.answer_start)]
        if final or not _may_become(text, starts):
            self._state = _State.CONTENT

    def _inside(self, final: bool) -> str:
        assert self._marks is not None
        if self._may_repeat and not self._is_begun(final):
            return ""
        ends = (self._marks.end, *self._other_ends)
        found = [(idx, end) for end in ends if (idx := self._buffer.find(end)) >= 0]
        if found:
            idx, end = min(found)
            text, self._buffer = self._buffer[:idx], self._buffer[idx:].removeprefix(self._marks.end)
            self._state = _State.BEHIND if end == self._marks.end else _State.CONTENT
        else:
            held = 0 if final else max(overlap(self._buffer, end) for end in ends)
            length = len(self._buffer) - held
            text, self._buffer = self._buffer[:length], self._buffer[length:]
        if not self._has_reasoning:
            text = text.lstrip()
        self._has_reasoning = self._has_reasoning or bool(text)
        text = self._space + text
        kept_len = max(len(text.rstrip()), len(text) - MAX_SPACE)
        self._space = text[kept_len:]
        return text[:kept_len]

    def _is_begun(self, final: bool) -> bool:
        """Whether it is known that the block's mark is written once more, or not; it is no thought."""
        assert self._marks is not None
        text, start = self._buffer.lstrip(), self._marks.start
        if not final and len(text) < len(start) and start.startswith(text) and len(self._buffer) <= MAX_SPACE:
            return False
        self._buffer, self._may_repeat = text.removeprefix(start), False
        return True

    def _behind(self, final: bool) -> None:
        assert self._marks is not None
        self._buffer = self._buffer.lstrip()
        message, answer = ("", "") if self._is_answer else (self._marks.next_message, self._marks.answer_start)
        if message and self._buffer.startswith(message):
            self._buffer = self._buffer[len(message) :]
            self._space = "\n" if self._has_reasoning else ""  # between this block and the next
            self._state = _State.START
        elif answer and self._buffer.startswith(answer):
            self._buffer, self._is_answer = self._buffer[len(answer) :].lstrip(), True
            message = answer = ""
        if (
            self._buffer
            and self._state is _State.BEHIND
            and (final or not _may_become(self._buffer, (message, answer)))
        ):
            self._state = _State.CONTENT

    def _content(self, final: bool) -> str:
        """All but what may be the mark that ends the answer, and the white space before it."""
        held = 0
        if end := self._marks.answer_end if self._marks is not None else "":
            idx = self._buffer.find(end)
            while idx >= 0 and self._buffer[idx + len(end) :].strip():  # it is no end where text follows
                idx = self._buffer.find(end, idx + 1)
            if idx < 0:
                idx = len(self._buffer) - (0 if final else overlap(self._buffer, end))
            held = len(self._buffer) - len(self._buffer[:idx].rstrip())
            if final and idx == len(self._buffer):
                held = 0
        length = len(self._buffer) - held
        text, self._buffer = self._buffer[:length], "" if final else self._buffer[length:]
        return text


def _may_become(text: str, marks: Sequence[str]) -> bool:
    """Whether one of `marks` begins with `text`."""
    return any(mark.startswith(text) for mark in marks if mark)
