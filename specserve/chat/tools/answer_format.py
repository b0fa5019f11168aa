"""An answer that keeps to a format, or calls tools: the format as a part of the tools' grammar.

Owns that the two can be told apart. What begins like a call is read as one, so a format in which an answer could begin
so is refused; whatever else comes is the answer, with every marker that it quotes.
"""

from __future__ import annotations

from collections.abc import Sequence

from llguidance import LLMatcher, LLTokenizer

from ...errors import GrammarError, UserError
from ...grammar.matcher_source import lark_expression, matcher_source, readable_reason
from ...messages import GrammarSpec
from .definitions import Tool
from .formats import ToolFormat


def answer_expression(spec: GrammarSpec, format: ToolFormat, tools: Sequence[Tool]) -> str:
    """`spec` for the rules of a grammar of `tools`. Compiles it: run it on a thread. Raises `UserError`."""
    expression = lark_expression(spec)
    if expression is None:
        raise UserError(
            "a regular expression or a grammar of your own has no place beside tools; send a JSON Schema or a list of "
            "choices, or tool_choice none",
            param="tools",
            code="unsupported",
        )
    matcher = LLMatcher(LLTokenizer("byte"), matcher_source(spec), log_level=0)
    if matcher.is_error():
        raise GrammarError(readable_reason(spec, matcher.get_error()))
    for tool in tools:
        begun = format.marker + format.opening + format.head(tool.name)
        if _may_begin(matcher, begun):
            raise UserError(
                f"an answer in the format that is asked for could begin with {begun!r}, as a call of tool "
                f"{tool.name!r} does; send a json_schema whose first property is required and is not 'name'",
                param="tools",
            )
    return expression


def _may_begin(matcher: LLMatcher, text: str) -> bool:
    tokens = list(text.encode())  # a token is a byte here
    return matcher.validate_tokens(tokens) == len(tokens)
