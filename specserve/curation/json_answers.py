"""What a model wrote where JSON was asked for.

Takes the whole answer, or the whole of one fenced block; never looks for JSON in the middle of other text, where it
could be a quotation.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import UserError
from ..strict_json import decode_json

_FENCED = re.compile(r"```[a-zA-Z]*\n(.*)\n```", re.DOTALL)


def read_json_object(answer: str) -> dict[str, Any]:
    """The object that `answer` is. Raises `UserError` that says why it is none."""
    text = answer.strip()
    if (fenced := _FENCED.fullmatch(text)) is not None:
        text = fenced[1]
    value = decode_json(text.encode("utf-8", "replace"), "the answer")
    if not isinstance(value, dict):
        raise UserError(f"the answer is {type(value).__name__}, not a JSON object")
    return value
