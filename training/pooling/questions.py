"""The questions that a classifier answers, as its training rows ask them, and a row's answers as targets.

Owns the layout of the score matrix: questions by name, each with consecutive outputs, one for each label. Texts make a
question of one label out of several (multi_class), lists one of labels that hold or not (multi_label), true and false
one of the labels no and yes. Probabilities in a list are of several labels, those in an object go with any of these;
where a question has nothing else, they are of one label if they add up to 1 in every row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ...adapter_kinds import Question
from ...errors import UserError
from .rows import Answer, ClassifyRow, Probabilities, SeveralProbabilities

NO, YES = "no", "yes"
Target = int | tuple[float, ...] | None
"""Index of the label; each label's 0 or 1, or its probability, NaN where it is not known; None: nothing is known."""
_ROUNDING = 0.01  # by which probabilities of one label may miss 1


def questions_of(rows: Sequence[ClassifyRow], min_label_rows: int, file: str) -> tuple[Question, ...]:
    """The questions of `rows`, with the labels that are frequent enough. Raises `UserError`."""
    kinds: dict[str, tuple[type, int]] = {}
    counts: dict[str, Counter[str]] = {}
    one_label: dict[str, bool] = {}  # of questions with probabilities: whether these add up to 1
    for row in rows:
        for name, answer in row.answers.items():
            if isinstance(answer, dict):
                counts.setdefault(name, Counter()).update(answer)  # type: ignore[arg-type]  # expected numbers
            else:
                counts.setdefault(name, Counter()).update(_labels(answer))
            own = _kind(answer)
            if own is dict:
                one_label[name] = one_label.get(name, True) and _is_one_label(answer)  # type: ignore[arg-type]
                continue
            kind, line = kinds.setdefault(name, (own, row.line))
            if kind is not own:
                raise UserError(
                    f"{file} line {row.line}: the answer to {name!r} is a {_word(own)}, in line {line} a "
                    f"{_word(kind)}; one question has one kind of answers",
                    param="data",
                )
    questions, first = [], 0
    for name in sorted(counts):
        is_multi = kinds[name][0] is tuple if name in kinds else not one_label[name]
        labels = tuple(sorted(label for label, count in counts[name].items() if count >= min_label_rows))
        least = 1 if is_multi else 2
        if len(labels) < least:
            found = ", ".join(f"{label!r} {count:g}" for label, count in counts[name].most_common(5)) or "none"
            raise UserError(
                f"{file}: question {name!r} has {len(labels)} labels of at least {min_label_rows} rows "
                f"(classify.min_label_rows), and {least} are needed; there are {found}",
                param="classify.min_label_rows",
            )
        questions.append(Question(name, "multi_label" if is_multi else "multi_class", labels, first))
        first += len(labels)
    return tuple(questions)


def left_out(rows: Sequence[ClassifyRow], questions: Sequence[Question]) -> dict[str, int]:
    """Of each question the labels in `rows` that are too rare to be one of its labels."""
    known = {question.name: set(question.labels) for question in questions}
    seen: dict[str, set[str]] = {}
    for row in rows:
        for name, answer in row.answers.items():
            seen.setdefault(name, set()).update(answer if isinstance(answer, dict) else _labels(answer))
    return {name: len(labels - known[name]) for name, labels in seen.items() if labels - known.get(name, set())}


def targets_of(row: ClassifyRow, questions: Sequence[Question], file: str) -> tuple[Target, ...]:
    """What each question's outputs should say; a single label that is none of them leaves its question open.

    Raises `UserError` for a question that there is not, and for an answer of another kind.
    """
    known = {question.name for question in questions}
    for name in row.answers:
        if name not in known:
            raise UserError(
                f"{file} line {row.line}: there is no question {name!r} in the training rows; known are "
                f"{', '.join(map(repr, sorted(known)))}",
                param="data",
            )
    return tuple(_target(row, question, file) for question in questions)


def _target(row: ClassifyRow, question: Question, file: str) -> Target:
    answer = row.answers.get(question.name)
    if answer is None:
        return None
    kind = _kind(answer)
    if kind is not dict and (kind is tuple) != (question.kind == "multi_label"):
        wanted = "a list of labels" if question.kind == "multi_label" else "one label"
        raise UserError(
            f"{file} line {row.line}: the answer to {question.name!r} is a {_word(kind)}; {wanted} is expected",
            param="data",
        )
    if isinstance(answer, dict):
        return _soft_target(answer, question, f"{file} line {row.line}")
    labels = _labels(answer)
    if question.kind == "multi_label":
        return tuple(float(label in labels) for label in question.labels)
    return question.labels.index(labels[0]) if labels[0] in question.labels else None


def _soft_target(answer: Probabilities, question: Question, where: str) -> Target:
    """Labels that are none of the question's are left out; one without a probability is open, or 0 of one label."""
    if question.kind == "multi_label":
        found = tuple(answer.get(label, math.nan) for label in question.labels)
        return None if all(map(math.isnan, found)) else found
    if not _is_one_label(answer):
        raise UserError(
            f"{where}: the probabilities of {question.name!r} add up to {sum(answer.values()):.3g}; of a question with "
            "one label they add up to 1",
            param="data",
        )
    known = [answer.get(label, 0.0) for label in question.labels]
    return tuple(chance / sum(known) for chance in known) if sum(known) else None


def _kind(answer: Answer) -> type[object]:
    """What a row says of its question: tuple of several labels, str or bool of one, dict of either."""
    return tuple if isinstance(answer, SeveralProbabilities) else type(answer)


def _is_one_label(answer: Probabilities) -> bool:
    return abs(sum(answer.values()) - 1) <= _ROUNDING


def _labels(answer: str | tuple[str, ...] | bool) -> tuple[str, ...]:
    if isinstance(answer, bool):
        return (YES if answer else NO,)
    return answer if isinstance(answer, tuple) else (answer,)


def _word(kind: type[object]) -> str:
    return {bool: "yes or no", tuple: "list"}.get(kind, "label")
