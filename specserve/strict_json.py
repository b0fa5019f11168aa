"""Reads a request body, or another text from outside, as JSON, and refuses what JSON parsers silently accept.

Owns the syntax only: encoding, nesting, duplicate keys, numbers that are not finite. `msgspec` is several times faster
than the standard library but keeps the last of two equal keys, which lets a proxy and this server read different
requests; so the standard parser builds the objects and `msgspec.convert` checks their types afterwards.
"""

from __future__ import annotations

import json
import math
import re
from functools import partial
from itertools import accumulate
from typing import Any, NoReturn

from .errors import UserError

MAX_NESTING = 64
_OTHERS = bytes(set(range(256)) - set(b'"[]{}'))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_STRIDE = 64 * 1024  # brackets between two chances for other threads
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def decode_json(body: bytes, what: str = "the request body") -> Any:
    """The value in `body`; a `UserError` (400, code `invalid_json`) says what is wrong with `what` otherwise."""
    if not body.strip():
        raise _invalid(f"{what} is empty; send a JSON object")
    if body.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise _invalid(f"{what} starts with a byte order mark; send plain UTF-8")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _invalid(f"{what} is not UTF-8: {error.reason} at byte {error.start}") from error
    _check_nesting(body, what)
    try:
        value = json.loads(
            text,
            object_pairs_hook=partial(_unique_keys, what),
            parse_constant=partial(_refuse_constant, what),
            parse_float=partial(_finite_float, what),
        )
        if _SURROGATE_ESCAPE.search(body):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise _invalid(f"{what} is not valid JSON: {error}") from error
    except UnicodeEncodeError as error:
        raise _invalid(f"a string in {what} holds half of a surrogate pair") from error
    except RecursionError as error:  # json's own limit; _check_nesting is far below it
        raise _nested(what) from error
    except ValueError as error:  # an integer of more than 4300 digits
        raise _invalid(f"{what} holds an integer of more than 4,300 digits") from error
    return value


def _check_nesting(body: bytes, what: str) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_NESTING:
        return
    # No regular expression: a string that never closes would be tried from each quote in it. Escapes go first, then
    # all but quotes and brackets; of what lies between quotes every other piece is a string's.
    marks = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _OTHERS).replace(b'""', b"")
    brackets = b"".join(marks.split(b'"')[::2])
    depth = 0
    for start in range(0, len(brackets), _STRIDE):
        depths = list(accumulate(map(_STEPS.__getitem__, brackets[start : start + _STRIDE]), initial=depth))
        if max(depths) > MAX_NESTING:
            raise _nested(what)
        depth = depths[-1]


def _unique_keys(what: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _invalid(f"the key {key[:100]!r} appears twice in one JSON object of {what}", param=key[:100])
            seen.add(key)
    return value


def _refuse_constant(what: str, name: str) -> NoReturn:
    raise _invalid(f"{name} in {what} is not a JSON number; send a finite one")


def _finite_float(what: str, digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _invalid(f"the number {digits[:40]} in {what} is too large for a 64-bit float")
    return value


def _invalid(message: str, param: str | None = None) -> UserError:
    return UserError(message, param=param, code="invalid_json")


def _nested(what: str) -> UserError:
    return _invalid(f"{what} is nested deeper than {MAX_NESTING} levels")
