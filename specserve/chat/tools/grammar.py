"""Tool calls as Lark grammars: the format's frame around each tool's parameter schema.

Owns the grammar text. `calls_grammar` holds a whole answer; `name_grammar` and `arguments_grammar` hold parts of one
whose arguments are written by another adapter than its names. Free text goes on until the frame's marker, from there on
the frame is forced, and after the calls only the end of the answer is left. An answer in a format takes the place of
calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .definitions import Tool
from .formats import PYTHON_TAG, ToolFormat

_LEXEMES = re.compile(r'[{}]|"[^"]*"|[:,] ?')  # of a schema's JSON
_TEXT = r"TEXT: /(.|\n)*/"
# Llama's frame has no marker: what starts like a call is one.
_TEXT_BEFORE_NO_CALL = r'TEXT: /(?s:.*)/ & ~/\{"name": "(?s:.*)/'


@dataclass(frozen=True, slots=True)
class Marks:
    """What a grammar can only name by id. `ids` are the format's parts that are one added token of the tokenizer each.

    `text_ids` are the other added tokens that are written as text, such as a thinking model's: free text may hold them.
    """

    ids: Mapping[str, int] = field(default_factory=dict)
    text_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Words:
    """What an answer may say beside calls: with neither, nothing. `expression`: all of it, in place of calls."""

    free_text: bool = False  # before calls or in their place
    expression: str = ""


def calls_grammar(format: ToolFormat, tools: Sequence[Tool], marks: Marks, words: Words, *, parallel: bool) -> str:
    """The whole answer: calls of `tools`, or what else `words` let it say."""
    start, tails = _heads(format, tools, words, " ")
    rules = [f'call: {start} ({" | ".join(f"tool_{idx}" for idx in range(len(tools)))}) {_id(format)} "}}"']
    for idx, (tool, tail) in enumerate(zip(tools, tails, strict=True)):
        rules += [f"tool_{idx}: {tail} args_{idx}", _schema(idx, tool)]
    rest = f"({_terms(format.between, marks)} call)*" if parallel and format.between else ""
    rules.append(f"calls: call {rest} {_terms(format.closing, marks)}")
    return "\n".join([*_start(format, marks, "calls", words), *rules]) + "\n"


def name_grammar(format: ToolFormat, tools: Sequence[Tool], marks: Marks, words: Words) -> str:
    """An answer up to the colon before its first call's arguments, or to its end without a call."""
    return "\n".join([*_start(format, marks, "name", words), _name(format, tools, words)]) + "\n"


def arguments_grammar(format: ToolFormat, tool: Tool, tools: Sequence[Tool], marks: Marks, *, parallel: bool) -> str:
    """From the colon before the arguments of `tool` to the end of the answer or the colon of the next call."""
    rules = [_schema(0, tool)]
    end = _terms(format.closing, marks)
    if parallel and format.between:
        rules.append(_name(format, tools, Words()))
        after = f"({end} | {_terms(format.between, marks)} name)"
    else:
        after = end
    return "\n".join([f'start: " " args_0 {_id(format)} "}}" {after}', *rules]) + "\n"


def _start(format: ToolFormat, marks: Marks, body: str, words: Words) -> list[str]:
    """The rule `start`: the frame's opening before `body`, which other words may precede or take the place of."""
    opening = _terms((format.opening,), marks)
    marker = _terms((format.marker,), marks)
    if words.expression:
        return [f"start: answer | {marker} {opening} {body}", f"answer: {words.expression}"]
    if not words.free_text:
        return [f"start: {marker} {opening} {body}"]
    token = f"<[{','.join(map(str, marks.text_ids))}]>"
    if not format.marker:
        tagged = f" | {_terms((PYTHON_TAG,), marks)} {body}" if PYTHON_TAG in marks.ids else ""
        more = f" ({token} ANY)*" if marks.text_ids else ""
        return [f"start: TEXT{more} | {body}{tagged}", _TEXT_BEFORE_NO_CALL, _TEXT.replace("TEXT", "ANY")]
    text = f"(TEXT {token})* TEXT" if marks.text_ids else "TEXT"
    if format.marker in marks.ids:
        return [f"start: {text} | {text} {marker} {opening} {body}", _TEXT]
    before = text.removesuffix("TEXT") + "before"
    return [f"start: {text} | {before} {opening} {body}", f"before[lazy]: TEXT {marker}", _TEXT]


def _name(format: ToolFormat, tools: Sequence[Tool], words: Words) -> str:
    start, tails = _heads(format, tools, words, "")
    return f"name: {start} ({' | '.join(tails)})"


def _heads(format: ToolFormat, tools: Sequence[Tool], words: Words, end: str) -> tuple[str, list[str]]:
    """What the heads of calls begin with, and the rest of each with `end` behind it, as terms.

    The matcher divides text greedily: where a call and an answer may begin alike, a call has to be divided as JSON is.
    """
    is_alike = words.expression and not format.marker
    start, terms = ('{"name": ', _lexemes) if is_alike else ('{"name": "', _literal)
    return terms(start), [terms(format.head(tool.name).removeprefix(start) + end) for tool in tools]


def _id(format: ToolFormat) -> str:
    """What may stand behind a call's arguments. Models that were trained to write it begin another call without."""
    return r'(", \"id\": \"" /[A-Za-z0-9]{9}/ "\"")?' if format.has_ids else ""


def _lexemes(text: str) -> str:
    return " ".join(_literal(part) for part in _LEXEMES.findall(text))


def _schema(idx: int, tool: Tool) -> str:
    return f"args_{idx}: %json {_dump(tool.schema)}"


def _terms(parts: Sequence[str], marks: Marks) -> str:
    """Grammar terms that spell `parts`; added tokens can only be named by id."""
    return " ".join(f"<[{marks.ids[part]}]>" if part in marks.ids else _literal(part) for part in parts if part)


def _literal(text: str) -> str:
    return json.dumps(text)


def _dump(schema: dict[str, Any]) -> str:
    return json.dumps(schema)
