"""A run of `specserve label`: functions vote on texts, a model weighs the votes, rows and a report are written.

Votes are kept beside the output as they come (votes.py), so that whatever interrupts a run costs the text in hand; the
rows and the report are replaced whole at the end.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from ...errors import UserError
from ...teachers import Budget, Teacher, TeacherSpec, open_teacher
from ...training.data.rows import parse_object, row_texts
from ...training.pooling.rows import ClassifyRow, read_pooling_rows
from ...whole_files import replace_file
from ..held_output import held
from ..progress import progress
from .asked import PromptFunction
from .classifiers import ClassifierFunction, Classifiers
from .functions import PatternFunction, PythonFunction
from .label_file import FunctionSpec, LabelFile, QuestionSpec
from .label_model import combined
from .report import Known, function_table, question_figures, warnings_of
from .rows import confidence, row_of
from .votes import Vote, VoteFile

VOTES_SUFFIX, REPORT_SUFFIX, LOCK_SUFFIX = ".votes", ".report.json", ".lock"


class LabellingFunction(Protocol):
    @property
    def digest(self) -> str: ...

    def votes(self, texts: Sequence[tuple[int, str]]) -> AsyncGenerator[tuple[int, Vote]]:
        """(place, vote) of each of these texts; what is kept when it ends early is what was yielded."""
        ...


@dataclass(frozen=True, slots=True)
class Labelled:
    """What came of it; `report` is what the report file holds."""

    rows: int
    texts: int
    report: dict[str, Any]


async def label(
    spec: LabelFile,
    *,
    model: str | None = None,
    teacher: TeacherSpec | None = None,
    budget: Budget | None = None,
    num_texts: int | None = None,
) -> Labelled:
    """Label the texts, or the first `num_texts`. Raises `UserError`; the votes so far stay."""
    with held(Path(spec.output), Path(spec.output + LOCK_SUFFIX), "output"):
        return await _labelled(spec, model, teacher, budget, num_texts)


async def _labelled(
    spec: LabelFile,
    model: str | None,
    teacher: TeacherSpec | None,
    budget: Budget | None,
    num_texts: int | None,
) -> Labelled:
    texts = _texts(spec, num_texts)
    known = _known(spec, texts)
    votes: dict[str, dict[str, list[Vote]]] = {name: {} for name in spec.questions}
    warnings: list[str] = []
    async with AsyncExitStack() as stack:
        classifiers = Classifiers(model)
        stack.push_async_callback(classifiers.close)
        asked = None
        if any(function.prompt is not None for _, _, function in spec.functions()):
            if teacher is None:
                raise UserError("the label file has prompts: name who answers them with --teacher", param="teacher")
            asked = await stack.enter_async_context(open_teacher(teacher, budget))
        functions = [
            (name, function.name, _made(function, name, question, classifiers, asked))
            for name, question, function in spec.functions()
        ]
        for name, function_name, voter in functions:
            with VoteFile(Path(spec.output + VOTES_SUFFIX), name, function_name, voter.digest) as file:
                await _vote(voter, texts, file, f"{name}: {function_name}")
                votes[name][function_name] = [file.vote(text) for text in texts]
            if isinstance(voter, PromptFunction):
                warnings += [f"{name}: {function_name!r} {what}" for what in voter.problems()]
    return _written(spec, texts, votes, known, warnings)


async def _vote(voter: LabellingFunction, texts: Sequence[str], file: VoteFile, what: str) -> None:
    missing = file.missing(texts)
    if not missing:
        return
    with progress(what, len(texts), len(texts) - len(missing)) as bar:
        async with aclosing(voter.votes(missing)) as votes:
            async for place, vote in votes:
                file.add(texts[place], vote)
                bar.update(1)


def _made(
    function: FunctionSpec, name: str, question: QuestionSpec, classifiers: Classifiers, teacher: Teacher | None
) -> LabellingFunction:
    at = f"questions.{name}.functions[{function.name!r}]"
    if function.pattern is not None:
        return PatternFunction(function, question)
    if function.python is not None:
        return PythonFunction(function, question, at)
    if function.classifier is not None:
        return ClassifierFunction(function, name, question, at, classifiers)
    assert teacher is not None
    return PromptFunction(function, question, teacher)


def _texts(spec: LabelFile, num_texts: int | None) -> list[str]:
    texts: list[str] = []
    for number, line in row_texts(spec.data):
        if num_texts is not None and len(texts) == num_texts:
            break
        where = f"{spec.data} line {number}"
        text = parse_object(line, where).get(spec.text_field)
        if not isinstance(text, str) or not text.strip():
            found = "missing" if text is None else "empty" if text == "" else f"{text!r:.60}"
            raise UserError(f"{where}: {spec.text_field} is {found}; text is expected (text_field names the field)",
                            param="data")  # fmt: skip
        texts.append(text)
    if not texts:
        raise UserError(f"{spec.data} holds no rows", param="data")
    return texts


def _known(spec: LabelFile, texts: Sequence[str]) -> dict[str, list[Known]]:
    """Of each question the known answers, in the texts' order."""
    rows: dict[str, ClassifyRow] = {}
    if spec.gold is not None:
        rows = {row.text: row for row in read_pooling_rows(spec.gold, "classify") if isinstance(row, ClassifyRow)}
        if not any(text in rows for text in texts):
            raise UserError(f"gold: {spec.gold} knows none of the texts of {spec.data}", param="gold")
    found: dict[str, list[Known]] = {}
    for name, question in spec.questions.items():
        found[name] = []
        for text in texts:
            row = rows.get(text)
            answer: Any = row.answers.get(name) if row is not None else None
            if isinstance(answer, bool):
                answer = "yes" if answer else "no"
            if answer is not None and not isinstance(answer, tuple if question.several else str):
                names: dict[type, str] = {str: "one label", tuple: "a list"}
                kind = names.get(type(answer), "probabilities")
                raise UserError(
                    f"gold: {spec.gold} line {row.line if row else 0} answers {name!r} with {kind}, and the label file "
                    f"has several: {str(question.several).lower()}, for which "
                    f"{'a list' if question.several else 'one label'} is expected",
                    param="gold",
                )
            found[name].append(answer)
    return found


def _written(
    spec: LabelFile,
    texts: Sequence[str],
    votes: dict[str, dict[str, list[Vote]]],
    known: dict[str, list[Known]],
    warnings: Sequence[str],
) -> Labelled:
    combined_answers: list[dict[str, dict[str, float]]] = [{} for _ in texts]
    report: dict[str, Any] = {"texts": len(texts), "questions": {}, "warnings": list(warnings)}
    for name, question in spec.questions.items():
        answers = combined(votes[name], question, spec.label_model)
        table = function_table(votes[name], question, answers, known[name])
        figures: dict[str, Any] = {
            "model": spec.label_model,
            "answered": sum(answer is not None for answer in answers) / len(texts),
        }
        if spec.gold is not None:
            figures[spec.label_model] = question_figures(question, name, answers, known[name])
            if spec.label_model != "majority":
                plain = combined(votes[name], question, "majority")
                figures["majority"] = question_figures(question, name, plain, known[name])
        report["questions"][name] = {**figures, "functions": table}
        report["warnings"] += warnings_of(name, question, votes[name], answers, table)
        for given, answer in zip(combined_answers, answers, strict=True):
            if answer is not None and confidence(answer, question) >= spec.min_confidence:
                given[name] = answer
    rows = [row_of(spec, text, given) for text, given in zip(texts, combined_answers, strict=True) if given]
    report["rows"] = len(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        replace_file(Path(spec.output), lambda path: path.write_text(lines, encoding="utf-8"), sync=True)
        content = msgspec.json.format(msgspec.json.encode(report), indent=2)
        replace_file(Path(spec.output + REPORT_SUFFIX), lambda path: path.write_bytes(content + b"\n"))
    except OSError as error:
        raise UserError(f"output: cannot write {spec.output}: {error.strerror or error}", param="output") from None
    return Labelled(len(rows), len(texts), report)
