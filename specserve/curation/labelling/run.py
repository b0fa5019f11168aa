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
from ...whole_files import replace_file
from ..held_output import check_writable, held
from ..progress import progress
from .asked import PromptFunction
from .classifiers import ClassifierFunction, Classifiers
from .functions import PatternFunction, PythonFunction
from .label_file import FunctionSpec, LabelFile, QuestionSpec
from .label_model import combined
from .report import Known, function_table, question_figures, warnings_of
from .rows import confidence, row_of
from .texts import Texts, read_texts
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
    texts = read_texts(spec, num_texts)
    num_bytes = Path(spec.data).stat().st_size  # about what the rows will have
    check_writable(Path(spec.output), [Path(spec.output + REPORT_SUFFIX)], num_bytes, "output")
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
                await _vote(voter, texts.all, file, f"{name}: {function_name}")
                votes[name][function_name] = [file.vote(text) for text in texts.all]
            if isinstance(voter, PromptFunction):
                warnings += [f"{name}: {function_name!r} {what}" for what in voter.problems()]
    return _written(spec, texts, votes, warnings)


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


def _written(
    spec: LabelFile,
    texts: Texts,
    votes: dict[str, dict[str, list[Vote]]],
    warnings: Sequence[str],
) -> Labelled:
    combined_answers: list[dict[str, dict[str, float]]] = [{} for _ in texts.rows]
    left_out = [{"line": one.line, "how": one.match.how, "row": one.match.key} for one in texts.left_out]
    report: dict[str, Any] = {
        "texts": len(texts.rows) + len(left_out),
        "held_out": left_out,
        "gold": len(texts.judging),
        "questions": {},
        "warnings": list(warnings),
    }
    for name, question in spec.questions.items():
        answers = combined(votes[name], question, spec.label_model)
        known: list[Known] = [*[None] * len(texts.rows), *texts.known[name]]
        table = function_table(votes[name], question, answers, known)
        figures: dict[str, Any] = {
            "model": spec.label_model,
            "answered": sum(answer is not None for answer in answers) / len(answers),
        }
        if spec.gold is not None:
            figures[spec.label_model] = question_figures(question, name, answers, known)
            if spec.label_model != "majority":
                plain = combined(votes[name], question, "majority")
                figures["majority"] = question_figures(question, name, plain, known)
        report["questions"][name] = {**figures, "functions": table}
        report["warnings"] += warnings_of(name, question, votes[name], answers, table)
        for given, answer in zip(combined_answers, answers[: len(texts.rows)], strict=True):
            if answer is not None and confidence(answer, question) >= spec.min_confidence:
                given[name] = answer
    rows = [row_of(spec, text, given) for text, given in zip(texts.rows, combined_answers, strict=True) if given]
    report["rows"] = len(rows)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        replace_file(Path(spec.output), lambda path: path.write_text(lines, encoding="utf-8"), sync=True)
        content = msgspec.json.format(msgspec.json.encode(report), indent=2)
        replace_file(Path(spec.output + REPORT_SUFFIX), lambda path: path.write_bytes(content + b"\n"))
    except OSError as error:
        raise UserError(f"output: cannot write {spec.output}: {error.strerror or error}", param="output") from None
    return Labelled(len(rows), report["texts"], report)
