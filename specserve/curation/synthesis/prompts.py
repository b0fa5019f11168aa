"""What a teacher is asked: for new inputs, for the answer to one, for a critique and for a better row.

Owns the wording and the reading of what comes back. Examples are seeds: "Self-Instruct" (Wang et al. 2023) shows them
in the same way; directions that change from ask to ask keep a teacher from writing the same input again. A single text
is asked for as a turn of a conversation whose earlier turns are the examples, which a small model follows better.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from ...errors import UserError
from ...teachers import READ_ONLY, quoted
from ..json_answers import read_json_object
from .row_shapes import Input, Pair, RowShape

Message = dict[str, Any]
Verdict = Literal["good", "fix", "drop"]
VERDICTS: tuple[Verdict, ...] = ("good", "fix", "drop")

DIRECTIONS = (
    "Make it a typical one.",
    "Let it be about something that none of these is about.",
    "Make it longer and more detailed than these.",
    "Make it short.",
    "Make it an unusual case that could still come up.",
    "Make it a difficult one.",
)
_MAX_SCHEMA = 2000  # characters; a longer one would fill the teacher's context
_TURN = {
    "type": "object",
    "properties": {"role": {"enum": ["user", "assistant"]}, "content": {"type": "string", "minLength": 1}},
    "required": ["role", "content"],
    "additionalProperties": False,
}


class Prompts:
    """Asks for rows of one shape and task."""

    def __init__(self, shape: RowShape, task: str):
        self._shape, self._task = shape, task
        self._input_schema = {"type": "array", "items": _TURN, "minItems": 1} if shape.has_turns else _text()

    # -- new inputs

    def propose(
        self, examples: Sequence[Pair], num: int, direction: str
    ) -> tuple[list[Message], dict[str, Any] | None]:
        """Messages that ask for `num` inputs, and the schema of the answer."""
        if num == 1 and not self._shape.has_turns:
            system = (
                f"You invent inputs for this task: {self._task}\n\nYou never do the task. Each of your replies is one "
                "new input of the same kind and form as the others, and nothing else."
            )
            messages = [_message("system", system)]
            for idx, example in enumerate(examples):
                messages.append(_message("user", "Write an input." if idx == 0 else "Write another input."))
                messages.append(_message("assistant", example.text))
            return [*messages, _message("user", f"Write another input. {direction}")], None
        what = "conversation, up to the user's message that is to be answered" if self._shape.has_turns else "text"
        prompt = (
            f"Rows are collected for this task: {self._task}\n\nThese are inputs of some rows:\n\n"
            f"{_examples([_shown(example.input) for example in examples])}\n\nWrite {num} new inputs of the same kind "
            "and form, as different from these and from each other as the inputs of real rows are. Do not do the task. "
            f"Of each: {direction}\n\n"
            f'Answer with JSON of the form {{"inputs": [...]}}, each input a {what}'
            + (', as a list of {"role": "user" or "assistant", "content": text}.' if self._shape.has_turns else ".")
        )
        return [_message("user", prompt)], _object({"inputs": {"type": "array", "items": self._input_schema}})

    def read_inputs(self, answer: str, num: int) -> list[Input]:
        """Raises `UserError` that says what is wrong with an answer to `propose`."""
        if num == 1 and not self._shape.has_turns:
            return [self._input(answer.strip())]
        inputs = read_json_object(answer).get("inputs")
        if not isinstance(inputs, list) or not inputs:
            raise UserError("the answer has no list of inputs")
        return [self._input(value) for value in inputs[:num]]

    # -- an answer

    def answer(self, input: Input, system: str | None, examples: Sequence[Pair]) -> list[Message]:
        """Messages whose answer is the row's; examples are earlier turns."""
        messages = [_message("system", "\n\n".join(filter(None, (self._task, system, self._form()))))]
        for example in examples:
            messages += _turns(example.input)
            messages.append(_message("assistant", example.answer))
        return messages + _turns(input)

    # -- critique and refinement

    def critique(
        self, input: Input, answer: str | None, examples: Sequence[Pair]
    ) -> tuple[list[Message], dict[str, Any]]:
        """Messages that ask what is wrong with a row, and the schema of the answer."""
        prompt = (
            f"Rows are collected for this task: {self._task}\n\nThese rows are right:\n\n{self._rows(examples, answer)}"
            f"\n\nThis row is new:\n\n{_marked(input, answer)}\n\n{READ_ONLY} Is its input one that "
            "could really come up, complete and of the same kind"
            + ("" if answer is None else ", and is its answer right and of the same form")
            + '? Answer with JSON: {"critique": what is wrong, in a few sentences, "verdict": "good" if nothing is, '
            '"fix" if it can be mended, "drop" if it cannot}.'
        )
        return [_message("user", prompt)], _object({"critique": {"type": "string"}, "verdict": {"enum": [*VERDICTS]}})

    def read_critique(self, answer: str) -> tuple[str, Verdict]:
        """Raises `UserError`."""
        value = read_json_object(answer)
        verdict = value.get("verdict")
        if verdict not in VERDICTS:
            raise UserError(f"the critique's verdict is {verdict!r}; one of {', '.join(VERDICTS)} is expected")
        return str(value.get("critique", "")), verdict

    def refine(
        self, input: Input, answer: str | None, critique: str, examples: Sequence[Pair]
    ) -> tuple[list[Message], dict[str, Any]]:
        """Messages that ask for the row without what the critique found, and the schema of the answer."""
        fields = {"input": self._input_schema}
        if answer is not None:
            fields["answer"] = self._shape.answer_schema or _text()
        prompt = (
            f"Rows are collected for this task: {self._task}\n\nThese rows are right:\n\n{self._rows(examples, answer)}"
            f"\n\nThis row is not:\n\n{_marked(input, answer)}\n\n{READ_ONLY} What is wrong with it: "
            f"{critique}\n\nWrite it as it should be, and change no more. Answer with JSON that has "
            f"{' and '.join(map(repr, fields))}."
        )
        return [_message("user", prompt)], _object(fields)

    def read_refined(self, answer: str, has_answer: bool) -> tuple[Input, str | None]:
        """Raises `UserError`."""
        value = read_json_object(answer)
        refined = self._input(value.get("input"))
        if not has_answer:
            return refined, None
        if "answer" not in value:
            raise UserError("the refined row has no answer")
        text = value["answer"]
        return refined, text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)

    def _input(self, value: Any) -> Input:
        if not self._shape.has_turns:
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"an input is {'empty' if isinstance(value, str) else type(value).__name__}, not text")
            return value.strip()
        if not isinstance(value, list) or not value:
            raise UserError("an input is no list of messages")
        for idx, turn in enumerate(value):
            wanted = ("user", "assistant")[idx % 2]
            if not isinstance(turn, dict) or turn.get("role") != wanted or not isinstance(turn.get("content"), str):
                raise UserError(f"message {idx} of an input is not a message of the {wanted}")
            if not turn["content"].strip():
                raise UserError(f"message {idx} of an input is empty")
        if len(value) % 2 == 0:
            raise UserError("an input does not end with the user's message")
        if len(value) == 1:
            return value[0]["content"].strip()
        return [_message(turn["role"], turn["content"].strip()) for turn in value]

    def _form(self) -> str:
        schema = self._shape.answer_schema
        if schema is None:
            return ""
        text = json.dumps(schema, ensure_ascii=False)
        return f"Answer with JSON of this JSON Schema: {text}" if len(text) <= _MAX_SCHEMA else "Answer with JSON."

    def _rows(self, examples: Sequence[Pair], answer: str | None) -> str:
        return _examples([self._row(pair.input, None if answer is None else pair.answer) for pair in examples])

    def _row(self, input: Input, answer: str | None) -> str:
        return f"Input:\n{_shown(input)}" + ("" if answer is None else f"\n\nAnswer:\n{answer}")


def _marked(input: Input, answer: str | None) -> str:
    return quoted([("input", _shown(input)), *([] if answer is None else [("answer", answer)])])


def _shown(input: Input) -> str:
    return input if isinstance(input, str) else json.dumps(input, ensure_ascii=False)


def _turns(input: Input) -> list[Message]:
    return [_message("user", input)] if isinstance(input, str) else list(input)


def _examples(texts: Sequence[str]) -> str:
    return "\n\n".join(f"<example {idx}>\n{text}\n</example {idx}>" for idx, text in enumerate(texts, start=1))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text() -> dict[str, Any]:
    return {"type": "string", "minLength": 1}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
