"""What a row asks and what it answers, for each format that can be trained on.

New rows are made in two steps, an input and the answer to it; a shape knows both parts of its format, how each is
written when a teacher reads or writes it, and how they become a row. Owns which rows cannot be made: those with tools,
thoughts or several answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ...errors import UserError
from ...training.data.row_messages import Conversation, read_conversation
from ...training.pooling.rows import ClassifyRow, EmbedRow, RerankRow, parse_pooling_row

Input = str | list[dict[str, Any]]  # a text, or the messages of a conversation before its last answer
Kind = Literal["prompt", "messages", "classify", "embed", "rerank"]

_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}


@dataclass(frozen=True, slots=True)
class Pair:
    """A row in its two parts. `answer` is the text that a teacher would write for it; `group` is what rows are to be
    balanced by."""

    input: Input
    answer: str
    line: int
    system: str | None = None
    group: str = ""

    @property
    def text(self) -> str:
        return input_text(self.input)


class RowShape(Protocol):
    """One format. `answer_schema` is None where an answer is any text."""

    kind: Kind
    answer_schema: dict[str, Any] | None
    has_turns: bool  # inputs are conversations

    def row(self, input: Input, answer: str | None, system: str | None) -> dict[str, Any]:
        """A row, or without `answer` its question alone. Raises `UserError` for an answer that is none."""
        ...


def input_text(input: Input) -> str:
    """What of an input is compared and counted."""
    return input if isinstance(input, str) else "\n".join(message["content"] for message in input)


def kind_of(value: dict[str, Any], where: str) -> Kind:
    """Which format a row has. Raises `UserError`."""
    if "text" in value and value.keys() & {"label", "labels", "answers"}:
        return "classify"
    if "query" in value:
        return "rerank" if value.keys() & {"documents", "scores"} else "embed"
    if "prompt" in value:
        return "prompt"
    if value.keys() & {"messages", "conversations", "instruction"}:
        return "messages"
    raise UserError(
        f"{where} has the fields {', '.join(map(repr, value)) or 'none'}, which are no row that can be trained on "
        "(docs/training.md)",
        param="seeds",
    )


def read_pair(value: dict[str, Any], kind: Kind, line: int, where: str) -> Pair:
    """The parts of a row. Raises `UserError` that starts with `where`."""
    if kind == "prompt" or kind == "messages":
        return _of_conversation(read_conversation(value, where), line, where)
    text = json.dumps(value)
    row = parse_pooling_row(text, line, where.removesuffix(f" line {line}"), kind)
    if isinstance(row, ClassifyRow):
        name = next(name for name in ("label", "labels", "answers") if value.get(name) is not None)
        answer = (
            value[name] if name != "answers" else {key: item for key, item in value[name].items() if item is not None}
        )
        return Pair(row.text, _json({name: answer}), line, group=_json(answer))
    if isinstance(row, EmbedRow):
        negatives = {"negatives": list(row.negatives)} if row.negatives else {}
        return Pair(row.query, _json({"positive": row.positive, **negatives}), line)
    return Pair(row.query, _json(_ranked(row)), line)


def shape_of(kind: Kind, pairs: Sequence[Pair], schema: dict[str, Any] | None) -> RowShape:
    """The shape of new rows like `pairs`, whose answers keep to `schema` if there is one. Raises `UserError`."""
    if kind in ("prompt", "messages"):
        return _Generated(kind, schema, any(not isinstance(pair.input, str) for pair in pairs))
    if schema is not None:
        raise UserError(
            f"--schema is for rows with answers in text; the answers of {kind} rows have a form of their own"
        )
    answers = [json.loads(pair.answer) for pair in pairs]
    if kind == "classify":
        return _Classified(answers)
    return _Searched(kind, [len(answer.get("negatives", ())) for answer in answers])


class _Generated:
    """Prompt and completion, or messages."""

    def __init__(self, kind: Kind, schema: dict[str, Any] | None, has_turns: bool):
        self.kind, self.answer_schema, self.has_turns = kind, schema, has_turns

    def row(self, input: Input, answer: str | None, system: str | None) -> dict[str, Any]:
        if self.kind == "prompt" and isinstance(input, str) and system is None:
            return {"prompt": input} | ({} if answer is None else {"completion": answer})
        messages = [{"role": "user", "content": input}] if isinstance(input, str) else list(input)
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return {"messages": messages}


class _Classified:
    """Texts with labels: those of the seeds and no others."""

    kind: Kind = "classify"
    has_turns = False

    def __init__(self, answers: Sequence[dict[str, Any]]):
        self._field = next(iter(answers[0]))
        if any(next(iter(answer)) != self._field for answer in answers):
            raise UserError(
                "some seeds have 'label', others 'labels' or 'answers'; give all of them one", param="seeds"
            )
        values = [answer[self._field] for answer in answers]
        if self._field == "answers":
            names = list(dict.fromkeys(name for value in values for name in value))
            asked = {name: _labels([value[name] for value in values if name in value], name) for name in names}
            schema = _object(asked, optional=[name for name in names if any(name not in value for value in values)])
        else:
            schema = _labels(values, self._field)
        self.answer_schema: dict[str, Any] | None = _object({self._field: schema})

    def row(self, input: Input, answer: str | None, system: str | None) -> dict[str, Any]:
        if answer is None:
            return {"text": input}
        value = json.loads(answer)[self._field]
        if self._field == "answers":
            value = {name: _once(item) for name, item in value.items()}
        return {"text": input, self._field: _once(value)}


class _Searched:
    """A query, a text that answers it, and as many that do not as seeds have."""

    has_turns = False

    def __init__(self, kind: Kind, nums: Sequence[int]):
        self.kind = kind
        negatives = {"type": "array", "items": _TEXT, "minItems": max(1, min(nums)), "maxItems": max(nums)}
        fields = {"positive": _TEXT} | ({"negatives": negatives} if max(nums) else {})
        self.answer_schema: dict[str, Any] | None = _object(fields, ["negatives"] if not min(nums) else [])

    def row(self, input: Input, answer: str | None, system: str | None) -> dict[str, Any]:
        if answer is None:
            return {"query": input}
        value = json.loads(answer)
        documents = [value["positive"], *value.get("negatives", ())]
        if len(set(documents)) < len(documents) or not all(text.strip() for text in documents):
            raise UserError("the answer has a document twice, or an empty one")
        return {"query": input, **value}


def _of_conversation(conversation: Conversation, line: int, where: str) -> Pair:
    messages = conversation.messages
    if conversation.tools or conversation.reasoning or any(m["role"] == "tool" or "tool_calls" in m for m in messages):
        raise UserError(f"{where} has tools or reasoning; rows like it are not made", param="seeds")
    system = None
    if messages[0]["role"] in ("system", "developer"):
        system, messages = messages[0]["content"], messages[1:]
    *before, answer = messages
    if any(message["role"] not in ("user", "assistant") for message in before) or not before:
        raise UserError(f"{where}: a user's message has to stand before the answer, and no second system message")
    if len(before) == 1:
        return Pair(before[0]["content"], answer["content"], line, system)
    turns = [{"role": message["role"], "content": message["content"]} for message in before]
    return Pair(turns, answer["content"], line, system)


def _ranked(row: EmbedRow | RerankRow) -> dict[str, Any]:
    assert isinstance(row, RerankRow)
    best = row.scores.index(max(row.scores))
    others = [text for text, score in zip(row.documents, row.scores, strict=True) if score < row.scores[best]]
    return {"positive": row.documents[best], "negatives": others}


def _labels(values: Sequence[Any], name: str) -> dict[str, Any]:
    """The schema of a question's answers."""
    if all(isinstance(value, bool) for value in values):
        return {"type": "boolean"}
    if all(isinstance(value, list) and all(isinstance(label, str) for label in value) for value in values):
        known = list(dict.fromkeys(label for value in values for label in value))
        return {"type": "array", "items": {"enum": known}, "maxItems": len(known)} if known else {"enum": [[]]}
    if all(isinstance(value, str) for value in values):
        return {"enum": list(dict.fromkeys(values))}
    raise UserError(f"the seeds' {name} are of different types; one label, a list of labels, or true and false")


def _object(properties: dict[str, Any], optional: Sequence[str] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _once(value: Any) -> Any:
    return list(dict.fromkeys(value)) if isinstance(value, list) else value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
