"""What a chat request's tools mean for its sequences: the format, the grammar, and who writes which part.

Owns the decision what is constrained. A call that must come, and a strict function, is held to its schema or refused
with 400; under tool_choice auto, a schema that cannot be enforced gives way to any JSON object, and tools that are too
large for a grammar are read from unconstrained text. The format of the answer, where one is asked for, always holds: it
says what comes in place of calls. A tool's adapter writes that tool's arguments (`switching`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ...errors import UserError
from ...messages import MAX_GRAMMAR_BYTES, GrammarSpec
from .answer_format import answer_expression
from .definitions import Tool, ToolUse, schema_problem
from .formats import PYTHON_TAG, ToolFormat
from .grammar import Marks, Words, arguments_grammar, calls_grammar, name_grammar
from .parser import CallParser


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """Tools that an answer can call. `grammar` is that of its first sequence; without one, calls are read as found."""

    format: ToolFormat
    tools: tuple[Tool, ...]
    marks: Marks
    words: Words
    parallel: bool
    switching: bool
    grammar: GrammarSpec | None

    def parser(self) -> CallParser:
        names = [tool.name for tool in self.tools]
        is_either = bool(self.words.expression)
        return CallParser(self.format, names, eager=self.grammar is not None, calls_or_text=is_either)

    def announced(self, text: str) -> Tool | None:
        """The tool whose arguments come next, behind `text` of a sequence of `switching` grammars."""
        for tool in self.tools:
            head = self.format.head(tool.name)
            if not self.format.marker:
                if text in (head, PYTHON_TAG + head):
                    return tool
            elif text.endswith((self.format.marker + self.format.opening + head, "".join(self.format.between) + head)):
                return tool
        return None

    def arguments_spec(self, tool: Tool) -> GrammarSpec:
        """The grammar of what follows the colon before the arguments of `tool`."""
        text = arguments_grammar(self.format, tool, self.tools, self.marks, parallel=self.parallel)
        return GrammarSpec("lark", text)


def make_plan(
    use: ToolUse, format: ToolFormat, marks: Marks, own_adapter: str | None, answer: GrammarSpec | None = None
) -> ToolPlan:
    """The plan of a request whose `model` is `own_adapter` and whose answer, if it calls nothing, keeps to `answer`.

    Compiles schemas to check them: run it on a thread. Raises `UserError` that names the tool and what of its schema
    cannot be enforced.
    """
    is_free = use.mode == "auto"  # to call nothing
    tools = tuple(_enforceable(tool, is_free) for tool in use.tools)
    words = Words(is_free)
    if is_free and answer is not None:
        words = Words(expression=answer_expression(answer, format, tools))
    adapters = {tool.adapter or own_adapter for tool in tools}
    switching = adapters != {own_adapter}
    text = calls_grammar(format, tools, marks, words, parallel=use.parallel)
    grammar: GrammarSpec | None = GrammarSpec("lark", text)
    if len(text.encode()) > MAX_GRAMMAR_BYTES:
        if not words.free_text or switching or any(tool.strict for tool in tools):
            raise UserError(
                f"the tools' schemas make a grammar of {len(text.encode())} bytes, with that of the answer if it has "
                f"one; at most {MAX_GRAMMAR_BYTES} are allowed where the output must fit them",
                param="tools",
            )
        grammar = None
    if switching:
        grammar = GrammarSpec("lark", name_grammar(format, tools, marks, words))
    return ToolPlan(format, tools, marks, words, use.parallel, switching, grammar)


def markers(format: ToolFormat) -> set[str]:
    """The parts of a format that a tokenizer may hold as one token."""
    return {part for part in (format.marker, *format.between, *format.closing, PYTHON_TAG) if part.strip()}


def direct_adapter(use: ToolUse | None, own_adapter: str | None) -> str | None:
    """The adapter of the whole request: the one tool's that must be called, if `model` names none; else its own."""
    if use is not None and use.mode == "named" and own_adapter is None:
        return use.tools[0].adapter
    return own_adapter


def _enforceable(tool: Tool, is_free: bool) -> Tool:
    problem = schema_problem(tool.schema)
    if problem is None:
        return tool
    if is_free and not tool.strict:
        return dataclasses.replace(tool, schema={"type": "object"})
    raise UserError(
        f"the parameters of tool {tool.name!r} cannot be enforced: {problem}; change them, or let the model choose "
        "(tool_choice auto, strict false)",
        param="tools",
        code="invalid_function_parameters",
    )
