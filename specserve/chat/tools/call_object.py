"""A call's JSON object: where it ends in a stream of text, and what it calls.

The scanner owns brackets and strings only: whether what lies between them is JSON is for the reader to say. It is
linear in the text, however that is cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import NoReturn

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


def read_call(text: str, tools: Collection[str]) -> tuple[str, str] | None:
    """(name, arguments as JSON text) of a call's object; None when it is none, or calls none of `tools`."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    keys = [key for key in ("arguments", "parameters") if key in value]
    known = set(value) <= {"name", "id", "type", *keys}
    if len(keys) != 1 or not known or value["name"] not in tools or not isinstance(value[keys[0]], dict):
        return None
    pattern = rf'\{{\s*"name"\s*:\s*"[^"\\]*"\s*,\s*"{keys[0]}"\s*:\s*'
    if set(value) == {"name", keys[0]} and (match := re.match(pattern, text)):
        return value["name"], text[match.end() : -1].rstrip()
    return value["name"], json.dumps(value[keys[0]], ensure_ascii=False)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
