"""A grammar spec in the matcher's own terms, and the matcher's errors in the terms of whoever wrote the spec.

Owns which dialect of grammars is read (Lark, or GBNF made into it), what of Lark is not served, and how a spec becomes
a part of another grammar. Schemas obey the same rules alone and within a grammar (json_schema.py).
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
from llguidance import LLMatcher, gbnf_to_lark

from ..errors import GrammarError
from ..messages import GrammarSpec
from .ecma_regex import check_repeats
from .json_schema import prepare

_EMBEDDED = re.compile(r"%json\s*(?=\{)")
_ATTRIBUTES = re.compile(r"[\[\]\n]|\b(max_tokens|temperature)\s*+=")
_GBNF = re.compile(r"^[^\S\n]*+[A-Za-z][\w-]*+\s*+::=", re.MULTILINE)
_REMOTE = re.compile(r"Resource '([^']*)' is not present")


def matcher_source(spec: GrammarSpec) -> str:
    """The spec as the matcher takes it. Raises `UserError`."""
    if spec.kind == "json_object":
        return _json_source({"type": "object"})
    if spec.kind == "json_schema":
        return _json_source(_parse(spec.text))
    if spec.kind == "choice":
        return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {_choices(spec)}\n")
    if spec.kind == "regex":
        check_repeats(spec.text)
        return LLMatcher.grammar_from_regex(spec.text)
    text = spec.text
    if _GBNF.search(text):
        try:
            text = gbnf_to_lark.gbnf_to_lark(text)
        except Exception as error:  # whatever its parser trips over is the grammar's fault
            raise GrammarError(f"the EBNF grammar cannot be read: {error}") from None
    return LLMatcher.grammar_from_lark(_with_prepared_schemas(text))


def lark_expression(spec: GrammarSpec) -> str | None:
    """`spec` as an expression of a Lark rule; None where it can only stand alone."""
    if spec.kind == "json_object":
        return '%json {"type": "object"}'
    if spec.kind == "choice":
        return _choices(spec)
    if spec.kind != "json_schema":
        return None
    schema = _parse(spec.text)
    return f"%json {json.dumps(schema)}" if isinstance(schema, dict) else f"%json {json.dumps(_of_boolean(schema))}"


def _of_boolean(schema: Any) -> dict[str, Any]:
    prepare(schema)  # which refuses false
    return {}


def _choices(spec: GrammarSpec) -> str:
    return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in _parse(spec.text))


def _json_source(schema: Any) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(prepare(schema)))
    except ValueError as error:
        raise GrammarError(f"the JSON Schema cannot be read: {error}") from None


def _parse(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise GrammarError(f"the grammar's JSON cannot be read: {error}") from None


def _with_prepared_schemas(text: str) -> str:
    """A Lark grammar whose %json schemas obey the same rules as a schema that stands alone."""
    result, end = [], 0
    for match in _EMBEDDED.finditer(text):
        if match.start() < end:  # inside the schema before
            continue
        try:
            schema, schema_end = json.JSONDecoder().raw_decode(text, match.end())
        except (ValueError, RecursionError) as error:
            raise GrammarError(f"a %json schema in the grammar cannot be read: {error}") from None
        result += [_checked(text[end : match.start()]), "%json ", json.dumps(prepare(schema))]
        end = schema_end
    return "".join([*result, _checked(text[end:])])


def _checked(lark: str) -> str:
    """A part of a Lark grammar that is not JSON."""
    check_repeats(lark)
    is_open = False  # within the brackets of one line
    for match in _ATTRIBUTES.finditer(lark):
        if match[1] is None:
            is_open = match[0] == "["
        elif is_open:
            raise GrammarError(f"the attribute {match[1]!r} in a grammar is not supported")
    return lark


def readable_reason(spec: GrammarSpec, error: str) -> str:
    """Why the matcher refuses `spec`, in words of whoever wrote it."""
    if match := _REMOTE.search(error):
        return f"the JSON Schema's $ref to {match[1][:200]!r} is not in the schema; nothing is fetched"
    reason = " ".join(error.replace("<non-verbose/>", "").split())
    if "NoExtension" in reason:
        reason = "no output satisfies it"
    elif "fuel" in reason or "too large" in reason or "TooComplex" in reason or "too complex" in reason:
        reason = f"it is larger than the limit for compiled grammars ({reason})"
    return f"the {spec.kind} grammar cannot be served: {reason[:400]}"
