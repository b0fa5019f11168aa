"""JSON Schema's regular expressions (ECMA-262) as the matcher's dialect (that of Rust's regex crate).

Only where both read the same text differently: white space and what a dot leaves out, and brackets and set operators
inside classes. What the matcher has no way to check (look-around, back-references) it refuses itself. Counts are
limited here, because an automaton of a thousand million states is built before anyone can stop it.
"""

from __future__ import annotations

import re

from ..errors import UserError

MAX_REPEAT = 10_000
_SPACES = "\\t\\n\\x0b\\f\\r \u00a0\ufeff\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_ESCAPES = {"s": f"[{_SPACES}]", "S": f"[^{_SPACES}]", "/": "/", "A": "A", "z": "z", "-": "\\-"}
_TOKEN = re.compile(r"\\.|.", re.DOTALL)
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


def to_rust(pattern: str) -> str:
    """`pattern` with ECMA's meaning. Raises `UserError` for what cannot be said."""
    check_repeats(pattern)
    result: list[str] = []
    in_class, class_start = False, 0
    for match in _TOKEN.finditer(pattern):
        token = match[0]
        if len(token) == 2:
            token = _ESCAPES.get(token[1], token)
        elif in_class:
            if token == "]" and match.start() > class_start:
                in_class = False
            elif token in "[&~":  # letters in ECMA; nested classes and set operations in Rust
                token = "\\" + token
            elif token == "-" and pattern[match.start() + 1 : match.start() + 2] == "-":
                raise UserError(f"the pattern {pattern[:80]!r} has -- in a class; write \\- for a dash")
        elif token == "[":
            in_class = True
            class_start = match.start() + (2 if pattern[match.start() + 1 : match.start() + 2] == "^" else 1)
            if pattern.startswith("]", class_start):
                raise UserError(f"the pattern {pattern[:80]!r} has an empty class; write \\] for a bracket")
        elif token == ".":
            token = "[^\\n\\r\u2028\u2029]"
        result.append(token)
    return "".join(result)


def check_repeats(pattern: str) -> None:
    """Raises `UserError` when a count of `pattern` is over the limit."""
    for match in _COUNT.finditer(pattern):
        if any(len(count or "") > 9 or int(count or 0) > MAX_REPEAT for count in match.groups()):
            raise UserError(f"the regular expression repeats {match[0][:40]} times; at most {MAX_REPEAT} are allowed")
