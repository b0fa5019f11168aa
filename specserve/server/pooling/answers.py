"""Pooled values in the shapes of answers: embeddings, scores, and the questions of a classification adapter.

Values are the engine's, finite; probabilities are `pooled_values`'.
"""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from operator import mul
from typing import Literal

import msgspec

from ...adapter_kinds import PoolingInfo, Question
from ...pooled_values import labels_of, probabilities, sigmoid
from .job import PooledTexts
from .request_types import EncodingFormat
from .response_types import AnsweredQuestion, Classification


def vectors(texts: PooledTexts, encoding: EncodingFormat | None) -> Sequence[list[float] | str]:
    """Values as numbers, or as the base64 of their little-endian float32, which is a third as long."""
    if encoding == "base64":
        return [base64.b64encode(each.values).decode() for each in texts.pooled]
    return texts.values()


def everything(texts: PooledTexts, raw: bool, encoding: EncodingFormat | None) -> Sequence[list[float] | str]:
    """Whatever the adapter makes of each text: an embedding, probabilities, or a score."""
    if texts.job.kind == "embed":
        return vectors(texts, encoding)
    if texts.job.kind == "rerank":
        found = [[score] for score in scores(texts, raw)]
    else:
        assert texts.info is not None
        questions = texts.info.questions
        found = [[value for each in chances(questions, outputs, raw) for value in each] for outputs in texts.values()]
    if encoding == "base64":
        return [base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode() for values in found]
    return found


def cosines(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> list[float]:
    """Of pairs of vectors; one `first` is paired with each of `second`."""
    if len(first) == 1:
        first = [first[0]] * len(second)
    return [_cosine(one, other) for one, other in zip(first, second, strict=True)]


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    scale = math.sqrt(sum(map(mul, one, one)) * sum(map(mul, other, other)))
    return sum(map(mul, one, other)) / scale if scale else 0.0


def scores(texts: PooledTexts, raw: bool = False) -> list[float]:
    """Of pairs: the output of a re-ranker, or as a probability of being relevant."""
    outputs = [values[0] for values in texts.values()]
    return outputs if raw else [sigmoid(value) for value in outputs]


def best_first(values: Sequence[float]) -> list[int]:
    """Their indices; of equals the first one first."""
    return sorted(range(len(values)), key=lambda idx: -values[idx])


def output_names(info: PoolingInfo) -> list[str]:
    """Of all outputs of a score matrix: labels, with their question's name in front where there are several."""
    if not info.questions:
        return [f"LABEL_{idx}" for idx in range(info.num_outputs)]
    is_one = len(info.questions) == 1
    return [label if is_one else f"{question.name}/{label}" for question in info.questions for label in question.labels]


def chances(questions: Sequence[Question], outputs: Sequence[float], raw: bool) -> list[list[float]]:
    """Of the labels of each question, or the outputs themselves."""
    if raw:
        return [list(outputs[each.first_output : each.first_output + len(each.labels)]) for each in questions]
    return [probabilities(question, outputs) for question in questions]


def classification(idx: int, questions: Sequence[Question], outputs: Sequence[float], raw: bool) -> Classification:
    """vLLM's shape, with each question's answer beside it."""
    shown = chances(questions, outputs, raw)
    answered = [
        AnsweredQuestion(each.name, each.kind, held(each, outputs), dict(zip(each.labels, values, strict=True)))
        for each, values in zip(questions, shown, strict=True)
    ]
    is_one = len(answered) == 1 and answered[0].kind == "multi_class"
    flat = [value for each in shown for value in each]
    return Classification(idx, answered[0].labels[0] if is_one else None, flat, len(flat), answered)


def held(question: Question, outputs: Sequence[float]) -> list[str]:
    """The labels that hold."""
    return labels_of(question, probabilities(question, outputs))


def questions_of(info: PoolingInfo) -> tuple[Question, ...]:
    """Of an adapter with a score matrix; a re-ranker asks whether the document is relevant."""
    return info.questions or (Question("relevance", "multi_label", tuple(output_names(info)), 0),)


def as_function(questions: Sequence[Question], function: str | None) -> Sequence[Question]:
    """The questions, read through softmax or sigmoid whatever the adapter was trained for."""
    if function not in ("softmax", "sigmoid"):
        return questions
    wanted: Literal["multi_class", "multi_label"] = "multi_class" if function == "softmax" else "multi_label"
    return [msgspec.structs.replace(question, kind=wanted, thresholds=()) for question in questions]
