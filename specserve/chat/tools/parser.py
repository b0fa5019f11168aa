"""Generated text to content and tool calls, as it comes.

Owns one choice's text. However it is cut into pieces, the joined events are the same, and no text is lost: what is not
a well-formed call of a known tool is content. With `eager`, for output that a grammar holds to the exact frame, a call
is announced once its name is certain and its arguments follow as they come; otherwise a call is held back until its
frame is complete and its JSON is read. With `calls_or_text` a text that does not begin as a call holds none. White
space around frames belongs to them, up to MAX_FRAME_SPACE characters.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection

from ..markers import overlap
from .call_object import ObjectScanner, read_call
from .events import Arguments, CallStart, Content, Event, merged
from .formats import HERMES_END, PYTHON_TAG, ToolFormat

MAX_BROKEN_CALLS = 16  # then the rest is content: each one costs a scan of what follows it
MAX_FRAME_SPACE = 64
_CALL_ID = re.compile(r', "id": "[A-Za-z0-9]{9}"')
_CALL_ID_LEN = len(', "id": "123456789"')


class _State(enum.Enum):
    TEXT = enum.auto()  # content, looking for a frame
    HEAD = enum.auto()  # the buffer starts with a frame, or with the next call in one
    ARGUMENTS = enum.auto()  # eager: streaming an announced call
    CLOSE = enum.auto()  # eager: behind the arguments
    REST = enum.auto()  # content to the end


class CallParser:
    """`push` text as it comes, `finish` once; both return events."""

    def __init__(self, format: ToolFormat, tools: Collection[str], *, eager: bool, calls_or_text: bool = False):
        self._format = format
        self._heads = {format.head(name) + " ": name for name in tools}
        self._tools = frozenset(tools)
        self._eager = eager
        self._calls_or_text = calls_or_text
        self._state = _State.TEXT
        self._buffer = ""
        self._space = ""  # white space that is content unless a frame follows
        self._opener = format.marker  # what the buffer starts with in HEAD, before the call
        self._separator = ""  # what stood before a further call; content when that is none
        self._in_content = False  # whether more than white space came since the start or the last frame
        self._scanner = ObjectScanner()
        self._num_scanned = 0  # held: how much of the buffer the scanner has seen
        self._parsed: tuple[int, str, str] | None = None  # held: (end of the object, name, arguments)
        self._num_broken = 0
        self._events: list[Event] = []
        self.num_calls = 0

    @property
    def is_whole(self) -> bool:
        """Whether every announced call has all of its arguments."""
        return self._state is not _State.ARGUMENTS

    def push(self, text: str) -> list[Event]:
        self._buffer += text
        while self._step(final=False):
            pass
        return self._take()

    def finish(self) -> list[Event]:
        """What is left when the output has ended."""
        while self._step(final=True):
            pass
        if self._space and not self.num_calls:
            self._events.append(Content(self._space))
        self._space = ""
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return merged(events)

    def _step(self, final: bool) -> bool:
        """Go on as far as the buffer allows; True when the state changed and more may follow."""
        if self._state is _State.REST:
            return self._content(len(self._buffer))
        if self._state is _State.TEXT:
            return self._text(final) if self._format.marker else self._bare_text(final)
        if self._state is _State.HEAD:
            return self._head(final)
        if self._state is _State.ARGUMENTS:
            return self._arguments()
        return self._close(final)

    # -- content

    def _content(self, length: int) -> bool:
        """Emit the first `length` characters as content; white space that may belong to a frame waits."""
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        if text and (self._space or not self._in_content):
            text, self._space = self._space + text, ""
            if len(text) <= MAX_FRAME_SPACE and not text.strip():
                self._space = text
                return False
        if text:
            self._in_content = True
            self._events.append(Content(text))
        return False

    def _text(self, final: bool) -> bool:
        marker, buffer = self._format.marker, self._buffer
        if self._calls_or_text and not self.num_calls and buffer and not _may_begin(buffer, marker):
            self._state = _State.REST
            return True
        if (start := buffer.find(marker)) >= 0:
            self._content(start)
            self._opener, self._state = marker, _State.HEAD
            return True
        held = 0 if final else overlap(buffer, marker)
        return self._content(len(buffer) - held)

    def _bare_text(self, final: bool) -> bool:
        """A format without marker: a call can only come first, or behind another call."""
        buffer = self._buffer
        # Where a grammar holds the output, white space before a call makes it text.
        skip = "" if self._eager else " \t\r\n"
        call = buffer.lstrip(skip + ";" if self.num_calls else skip) if skip else buffer
        lead = buffer[: len(buffer) - len(call)]
        if len(lead) > MAX_FRAME_SPACE:
            self._state = _State.REST
            return True
        opener = PYTHON_TAG if call.startswith(PYTHON_TAG) else ""
        if not final and (not call or (not opener and PYTHON_TAG.startswith(call))):
            return False
        if call[len(opener) :].lstrip(skip or None)[:1] == "{":
            self._separator, self._opener, self._buffer = lead, opener, call
            self._state = _State.HEAD
            return True
        if opener and not final and not call[len(opener) :].strip():
            return False
        if self.num_calls and not buffer.strip(" \t\r\n;"):
            self._buffer = ""
            return False
        self._state = _State.REST
        return True

    # -- calls

    def _head(self, final: bool) -> bool:
        start = self._call_start(final)
        if start is None:
            return False
        if start < 0:
            return self._broken()
        return self._eager_head(start, final) if self._eager else self._held_call(start, final)

    def _call_start(self, final: bool) -> int | None:
        """Where the call's object starts: None when that is not known yet, -1 when there is none."""
        opening = self._format.opening.strip() if self._opener == self._format.marker and self._opener else ""
        rest = self._buffer[len(self._opener) :]
        seen = "".join(rest[: MAX_FRAME_SPACE + 2].split())
        if seen.startswith(opening + "{"):
            return len(self._opener) + rest.index("{")
        if (opening + "{").startswith(seen) and len(rest) <= MAX_FRAME_SPACE and not final:
            return None
        return -1

    def _eager_head(self, start: int, final: bool) -> bool:
        call = self._buffer[start:]
        for head, name in self._heads.items():
            if call.startswith(head) and len(call) > len(head):
                if call[len(head)] != "{":
                    return self._broken()
                self._announce(name)
                self._buffer = self._buffer[start + len(head) :]
                self._state = _State.ARGUMENTS
                return True
        if not final and any(head.startswith(call) for head in self._heads):
            return False
        return self._broken()

    def _arguments(self) -> bool:
        text = self._buffer
        end = self._scanner.feed(text)
        if text:
            self._events.append(Arguments(self.num_calls - 1, text[:end]))
        self._buffer = "" if end is None else text[end:]
        if end is not None:
            self._state = _State.CLOSE
        return end is not None

    def _close(self, final: bool) -> bool:
        """Eager: the object's own bracket, then the frame's end or its next call."""
        text = self._buffer.lstrip()
        if self._format.has_ids and text.startswith(","):
            said = _CALL_ID.match(text)
            if said is None and len(text) < _CALL_ID_LEN:
                self._buffer = "" if final else text  # cut off within the id
                return False
            text = text[said.end() :] if said is not None else text
        if not text and not final:
            return False
        length = self._closing(text[1:]) if text[:1] == "}" else -1
        if length is None and not final:
            return False
        if length is None or not text:
            self._buffer = ""  # cut off within the frame's end
            return False
        if length < 0:
            self._state = _State.TEXT if self._format.marker else _State.REST
            self._in_content = True  # a broken end is content as it stands
            return True
        self._buffer = text[1 + length :]
        return True

    def _held_call(self, start: int, final: bool) -> bool:
        if self._parsed is None:
            seen = max(start, self._num_scanned)
            end = self._scanner.feed(self._buffer[seen:])
            self._num_scanned = len(self._buffer)
            if end is None:
                return self._broken() if final else False
            if (parsed := read_call(self._buffer[start : seen + end], self._tools)) is None:
                return self._broken()
            self._parsed = (seen + end, *parsed)
        end, name, arguments = self._parsed
        length = self._closing(self._buffer[end:])
        if length is None and not final:
            return False
        if length is None or length < 0:
            return self._broken()
        following = self._separator if self._state is _State.HEAD else ""
        self._announce(name)
        self._events.append(Arguments(self.num_calls - 1, arguments))
        self._separator, self._buffer = following, self._buffer[end + length :]
        return True

    def _closing(self, text: str) -> int | None:
        """How much of `text` ends the call, and the state behind it; None: not known yet, -1: it is something else."""
        rest = text.lstrip()
        space = len(text) - len(rest)
        if space > MAX_FRAME_SPACE:
            return -1
        if self._format.name == "llama3":
            self._state = _State.TEXT
            return 0
        if self._format.name == "hermes":
            if rest.startswith(HERMES_END):
                self._state = _State.TEXT
                return space + len(HERMES_END)
            return None if HERMES_END.startswith(rest) else -1
        if rest.startswith("]"):
            self._state = _State.TEXT
            return space + 1
        following = rest[1:].lstrip()
        if rest.startswith(",") and following.startswith("{"):
            self._state, self._opener = _State.HEAD, ""
            length = len(text) - len(following)
            self._separator = text[:length]
            return length
        return None if not rest or (rest.startswith(",") and not following) else -1

    def _start_over(self) -> None:
        """Nothing of the next call has been seen."""
        self._scanner, self._num_scanned, self._parsed = ObjectScanner(), 0, None

    def _announce(self, name: str) -> None:
        self._start_over()
        self._space, self._in_content, self._separator = "", False, ""
        self._events.append(CallStart(self.num_calls, name))
        self.num_calls += 1

    def _broken(self) -> bool:
        """What looked like a call is content; calls may still follow a marker."""
        self._start_over()
        self._num_broken += 1
        self._in_content = True
        self._buffer = self._space + self._separator + self._buffer
        consumed = len(self._space) + len(self._separator) + len(self._opener)
        self._space = self._separator = ""
        again = bool(self._format.marker) and self._num_broken < MAX_BROKEN_CALLS and not self._calls_or_text
        self._state = _State.TEXT if again else _State.REST
        if again:
            self._content(consumed)
        return True


def _may_begin(text: str, marker: str) -> bool:
    """Whether `text`, of which more may come, begins with `marker`."""
    return text.startswith(marker) or marker.startswith(text)
