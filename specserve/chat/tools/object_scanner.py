"""Where a JSON object in a stream of text ends.

Owns brackets and strings only: whether what lies between them is JSON is for a JSON parser to say. Linear in the text,
however it is cut.
"""

from __future__ import annotations

import re

_STRUCTURE = re.compile(r'["\\{}\[\]]')


class ObjectScanner:
    """Finds where a JSON object ends; text may come in pieces. Brackets are counted, strings skipped."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._skip = False  # the next character is escaped

    def feed(self, text: str) -> int | None:
        """The index behind the object's last bracket, None when `text` does not hold it."""
        start = 1 if self._skip and text else 0
        self._skip = self._skip and not text
        for match in _STRUCTURE.finditer(text, start):
            idx, char = match.start(), match[0]
            if idx < start:
                continue
            if char == "\\":
                start = idx + 2 if self._in_string else start
                self._skip = self._in_string and idx + 1 == len(text)
            elif char == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if char in "{[" else -1
                if self._depth == 0:
                    return idx + 1
        return None
