"""The JSON files of an adapter as objects, and values of theirs in messages.

Owns the syntax, which is the same for all of them; what each may say is its own file's.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from typing import Any, NoReturn

from ..errors import AdapterError


def decode_object(name: str, file: str, data: bytes, wanted: str) -> dict[str, Any]:
    """The object in `file` of adapter `name`, whatever it says; `wanted` describes it. Raises `AdapterError`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            refuse(name, f"{file} has the key {shown(twice)} twice; which one holds is not clear")
        return found

    try:
        config = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        refuse(name, f"{file} is not valid JSON: {error}")
    if not isinstance(config, dict):
        refuse(name, f"{file} holds {type(config).__name__}, not {wanted}")
    return config


def shown(value: Any) -> str:
    """A value in a message: on one line, cut to a length, whatever it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return short.repr(value)


def refuse(name: str, reason: str) -> NoReturn:
    """Raise `AdapterError` of adapter `name`."""
    raise AdapterError(f"adapter {name!r}: {reason}")
