"""Rows that train an adapter that pools: pairs to embed, lists to re-rank, texts to classify.

Owns these formats and the wording of what is wrong with a row, by file, line and field. Fields that no format has are
ignored and listed by `--check-data`, but for those that would say otherwise what a row means.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from ...errors import UserError
from ..data.rows import parse_object, row_texts

PoolingTask = Literal["embed", "rerank", "classify"]
Probabilities = dict[str, float]  # by label; of one label or of several, as the question is


class SeveralProbabilities(Probabilities):
    """Of labels that each hold or not, which rows write as a list."""


Answer = str | tuple[str, ...] | bool | Probabilities

LABEL, LABELS = "label", "labels"  # names of the question that rows without `answers` answer
_FIELDS: dict[PoolingTask, tuple[str, ...]] = {
    "embed": ("query", "positive", "negatives"),
    "rerank": ("query", "documents", "scores", "positive", "negatives"),
    "classify": ("text", "label", "labels", "answers"),
}
_WANTED: dict[PoolingTask, str] = {
    "embed": "'query' and 'positive', and may be 'negatives'",
    "rerank": "'query', 'documents' and one of 'scores' and 'positive', or 'query', 'positive' and 'negatives'",
    "classify": "'text' and one of 'label', 'labels' and 'answers'",
}
_REFUSED = ("messages", "prompt", "completion", "system", "instruction", "hard_negatives", "neg", "pos")


@dataclass(frozen=True, slots=True)
class EmbedRow:
    query: str
    positive: str
    negatives: tuple[str, ...]
    line: int
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RerankRow:
    """`scores[i]` says how well `documents[i]` fits, in any unit; not all are equal, none is below 0."""

    query: str
    documents: tuple[str, ...]
    scores: tuple[float, ...]
    line: int
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ClassifyRow:
    """Answers by question: one label, a tuple of those that hold, yes and no, or how likely each label is.

    A question that is missing is open.
    """

    text: str
    answers: dict[str, Answer]
    line: int
    unread: tuple[str, ...] = ()


PoolingRow = EmbedRow | RerankRow | ClassifyRow


def read_pooling_rows(path: str | Path, task: PoolingTask, max_rows: int | None = None) -> list[PoolingRow]:
    """The rows of a JSONL file. Raises `UserError` that names the file, the line and the field of the first bad one."""
    rows = [parse_pooling_row(text, number, path, task) for number, text in islice(row_texts(path), max_rows)]
    if not rows:
        raise UserError(f"{path} holds no rows", param="data")
    return rows


def all_pooling_rows(
    path: str | Path, task: PoolingTask, max_rows: int | None = None
) -> tuple[list[PoolingRow], list[UserError]]:
    """The good rows, and what is wrong with the others."""
    rows, bad = [], []
    for number, text in islice(row_texts(path), max_rows):
        try:
            rows.append(parse_pooling_row(text, number, path, task))
        except UserError as error:
            bad.append(error)
    return rows, bad


def parse_pooling_row(text: str, line: int, path: str | Path, task: PoolingTask) -> PoolingRow:
    """One line of the file. Raises `UserError`."""
    return _Reader(f"{path} line {line}", line, parse_object(text, f"{path} line {line}"), task).row()


class _Reader:
    def __init__(self, where: str, line: int, value: dict[str, Any], task: PoolingTask):
        self._where, self._line, self._task = where, line, task
        self._value = {name: item for name, item in value.items() if item is not None}
        for name in _REFUSED:
            if name in self._value:
                raise self._wrong(f"{name!r} is not read where task is {task}; wanted are {_WANTED[task]}")
        self._unread = tuple(name for name in self._value if name not in _FIELDS[task])

    def row(self) -> PoolingRow:
        if self._task == "embed":
            negatives = tuple(self._texts("negatives")) if "negatives" in self._value else ()
            row = EmbedRow(self._text("query"), self._text("positive"), negatives, self._line, self._unread)
            if row.positive in row.negatives:
                raise self._wrong(f"negatives[{row.negatives.index(row.positive)}] is the positive, too")
            return row
        return self._rerank() if self._task == "rerank" else self._classify()

    # -- rerank

    def _rerank(self) -> RerankRow:
        query = self._text("query")
        if "documents" in self._value:
            if "negatives" in self._value or ("scores" in self._value) == ("positive" in self._value):
                raise self._wrong(f"wanted are {_WANTED['rerank']}")
            documents = tuple(self._texts("documents"))
            scores = self._scores(documents) if "scores" in self._value else self._positives(documents)
        else:
            negatives = tuple(self._texts("negatives"))
            documents, scores = (self._text("positive"), *negatives), (1.0, *(0.0 for _ in negatives))
        if len(documents) < 2:
            raise self._wrong(f"there are {len(documents)} documents; two are the least that can be ranked")
        if len(set(documents)) < len(documents):
            twice = next(idx for idx, text in enumerate(documents) if text in documents[:idx])
            raise self._wrong(f"documents[{twice}] stands there twice; keep one")
        if len(set(scores)) == 1:
            raise self._wrong(f"every document has the score {scores[0]:g}, so there is nothing to learn")
        return RerankRow(query, documents, scores, self._line, self._unread)

    def _scores(self, documents: tuple[str, ...]) -> tuple[float, ...]:
        scores = self._value["scores"]
        if not isinstance(scores, list) or len(scores) != len(documents):
            found = len(scores) if isinstance(scores, list) else type(scores).__name__
            raise self._wrong(f"scores: {found}; a list of {len(documents)} numbers is expected, one for each document")
        for idx, score in enumerate(scores):
            if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score < math.inf:
                raise self._wrong(f"scores[{idx}] is {score!r}; a number of at least 0 is expected")
        return tuple(map(float, scores))

    def _positives(self, documents: tuple[str, ...]) -> tuple[float, ...]:
        found = self._value["positive"]
        for idx in (places := found if isinstance(found, list) else [found]):
            if isinstance(idx, bool) or not isinstance(idx, int) or not 0 <= idx < len(documents):
                raise self._wrong(
                    f"positive is {found!r}; the place of a document is expected, 0 to {len(documents) - 1}, or a list"
                )
        return tuple(float(idx in places) for idx in range(len(documents)))

    # -- classify

    def _classify(self) -> ClassifyRow:
        given = [name for name in ("label", "labels", "answers") if name in self._value]
        if len(given) != 1:
            raise self._wrong(f"it has {' and '.join(given) or 'no label'}; wanted are {_WANTED['classify']}")
        text, value = self._text("text"), self._value[given[0]]
        if given[0] == "label":
            if not isinstance(value, str | bool) or value == "":
                raise self._wrong(f"label is {value!r}; text or true and false are expected")
            answers: dict[str, Answer] = {LABEL: value}
        elif given[0] == "labels":
            answers = {LABELS: self._labels(value, "labels")}
        else:
            if not isinstance(value, dict) or not any(item is not None for item in value.values()):
                raise self._wrong("answers: an object with an answer to at least one question is expected")
            answers = {}
            for name, item in value.items():
                at = f"answers[{name!r}]"
                if not name:
                    raise self._wrong(f"{at}: a question needs a name")
                if isinstance(item, list) and any(isinstance(part, dict) for part in item):
                    answers[name] = self._several_probabilities(item, at)
                elif isinstance(item, list):
                    answers[name] = self._labels(item, at)
                elif isinstance(item, dict):
                    answers[name] = self._probabilities(item, at)
                elif isinstance(item, str | bool) and item != "":
                    answers[name] = item
                elif item is not None:
                    raise self._wrong(
                        f"{at} is {item!r}; a label, a list of labels, their probabilities, true, false or null are "
                        "expected"
                    )
        return ClassifyRow(text, answers, self._line, self._unread)

    def _labels(self, value: Any, at: str) -> tuple[str, ...]:
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise self._wrong(f"{at} is {value!r}; a list of labels is expected, empty if none holds")
        return tuple(dict.fromkeys(value))

    def _probabilities(self, value: dict[str, Any], at: str) -> Probabilities:
        if not value or "" in value:
            raise self._wrong(f"{at} is {value!r}; the probability of at least one label is expected")
        return {label: self._probability(chance, f"{at}[{label!r}]") for label, chance in value.items()}

    def _several_probabilities(self, value: list[Any], at: str) -> SeveralProbabilities:
        found = SeveralProbabilities()
        for idx, part in enumerate(value):
            label = part.get("label") if isinstance(part, dict) and part.keys() == {"label", "probability"} else None
            if not isinstance(label, str) or not label:
                raise self._wrong(f"{at}[{idx}] is {part!r}; {{'label': ..., 'probability': ...}} is expected")
            if label in found:
                raise self._wrong(f"{at}[{idx}]: the label {label!r} stands there twice; keep one")
            found[label] = self._probability(part["probability"], f"{at}[{idx}].probability")
        return found

    def _probability(self, chance: Any, at: str) -> float:
        if isinstance(chance, bool) or not isinstance(chance, int | float) or not 0 <= chance <= 1:
            raise self._wrong(f"{at} is {chance!r}; a probability from 0 to 1 is expected")
        return float(chance)

    # -- fields

    def _texts(self, field: str) -> Iterator[str]:
        value = self._value.get(field)
        if not isinstance(value, list) or not value:
            found = "missing" if value is None else "empty" if value == [] else type(value).__name__
            raise self._wrong(f"{field} is {found}; a list of texts is expected")
        for idx, text in enumerate(value):
            yield self._checked(text, f"{field}[{idx}]")

    def _text(self, field: str) -> str:
        if field not in self._value:
            raise self._wrong(
                f"{field} is missing; it has the fields {', '.join(map(repr, self._value)) or 'none'}, wanted are "
                f"{_WANTED[self._task]}"
            )
        return self._checked(self._value[field], field)

    def _checked(self, text: Any, at: str) -> str:
        if not isinstance(text, str) or not text.strip():
            raise self._wrong(f"{at} is {'empty' if isinstance(text, str) else type(text).__name__}; text is expected")
        return text

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self._where}: {what}", param="data")
