"""Whether an answer is JSON of a schema, judged by the grammar with which specserve serves that schema.

Owns the one form in which such an answer is written into rows: what is trained on is what can be served under the
schema, to the space behind a colon. Where an answer breaks off from the schema is named by what stands there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from ..errors import GrammarError, UserError, shortened
from ..grammar.json_schema import DEFAULT_SEPARATORS
from ..grammar.matcher_source import matcher_source, readable_reason
from ..grammar.structured_output import schema_spec
from ..strict_json import decode_json

_SHOWN = 24  # characters on either side of what does not fit


class AnswerSchema:
    """Checks answers against `schema`, a JSON Schema. Raises `UserError` for one that cannot be served."""

    def __init__(self, schema: Any, param: str = "schema"):
        spec = schema_spec(schema, param)
        self._matcher = LLMatcher(LLTokenizer("byte"), matcher_source(spec), log_level=0)
        if self._matcher.is_error():
            raise GrammarError(readable_reason(spec, self._matcher.get_error()))
        given = schema.get("x-guidance", {}) if isinstance(schema, dict) else {}
        options = {**DEFAULT_SEPARATORS, **given}
        self._separators = (options["item_separator"], options["key_separator"])

    def normal(self, answer: str) -> str:
        """`answer` as it is written into a row. Raises `UserError` that says where it is not of the schema."""
        answer = answer.strip()
        value = decode_json(answer.encode("utf-8", "replace"), "the answer")
        if self._refused(answer) is None:
            return answer
        text = json.dumps(value, ensure_ascii=False, separators=self._separators)
        if (refused := self._refused(text)) is not None:
            raise UserError(f"the answer is not of the schema: {refused}")
        return text

    def _refused(self, text: str) -> str | None:
        tokens = list(text.encode())  # a token is a byte here
        matcher = self._matcher.deep_copy()
        num = matcher.try_consume_tokens(tokens)
        read, rest = (bytes(part).decode(errors="ignore") for part in (tokens[:num], tokens[num:]))
        if num < len(tokens):
            return f"{rest[:_SHOWN]!r} behind {read[-_SHOWN:]!r} is not allowed there"
        return None if matcher.is_accepting() else f"something is missing behind {text[-_SHOWN:]!r}"

    def problem(self, answer: str) -> str | None:
        """What `normal` would say against `answer`."""
        try:
            self.normal(answer)
        except UserError as error:
            return shortened(error)
        return None


def read_schema(path: Path) -> dict[str, Any]:
    """The JSON Schema in a file. Raises `UserError`."""
    try:
        schema = decode_json(path.read_bytes(), str(path))
    except OSError as error:
        raise UserError(f"cannot read the schema {path}: {error.strerror}", param="schema") from None
    if not isinstance(schema, dict):
        raise UserError(f"{path} holds {type(schema).__name__}; a JSON Schema is an object", param="schema")
    AnswerSchema(schema)
    return schema
