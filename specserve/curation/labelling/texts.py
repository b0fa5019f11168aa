"""The texts of a labelling: those that become rows, those with known answers that only judge, and those left out.

Invariant: no text that becomes a row repeats one that something is measured on, a row of `gold` or `held_out`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...training.data.rows import parse_object, row_texts
from ...training.data.text_identity import text_key
from ...training.pooling.rows import ClassifyRow, read_pooling_rows
from ..contamination import HeldOut, Match
from ..synthesis.seeds import read_held_out
from .label_file import LabelFile
from .report import Known
from .rows import prompt_of


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A line of the data and the row that it repeats."""

    line: int
    match: Match


@dataclass(frozen=True, slots=True)
class Texts:
    """`known` are of each question the answers to `judging`, in that order."""

    rows: list[str]
    judging: list[str]
    known: dict[str, list[Known]]
    left_out: list[LeftOut]

    @property
    def all(self) -> list[str]:
        """What is voted on."""
        return self.rows + self.judging


def read_texts(spec: LabelFile, num_texts: int | None) -> Texts:
    """Of the data and of gold, or of the first `num_texts` of each. Raises `UserError`."""
    lines = _lines(spec, num_texts)
    gold = _gold(spec)
    held_out = {f"{Path(str(spec.gold)).name} line {row.line}": row.text for row in gold}
    held_out |= read_held_out([Path(path) for path in spec.held_out_files])
    found = _left_out(spec, lines, held_out) if held_out else []
    if len(found) == len(lines):
        files = ", ".join(path for path in (spec.gold, *spec.held_out_files) if path is not None)
        raise UserError(
            f"data: all {len(lines)} texts of {spec.data} stand in {files}, too, on which nothing is to be trained; "
            "leave texts that are to become rows out of those files",
            param="data",
        )
    left_out = {one.line for one in found}
    judging = gold[:num_texts]
    return Texts(
        [text for line, text in lines if line not in left_out],
        [row.text for row in judging],
        _known(spec, judging),
        found,
    )


def _lines(spec: LabelFile, num_texts: int | None) -> list[tuple[int, str]]:
    lines: list[tuple[int, str]] = []
    for number, line in islice(row_texts(spec.data), num_texts):
        where = f"{spec.data} line {number}"
        text = parse_object(line, where).get(spec.text_field)
        if not isinstance(text, str) or not text.strip():
            found = "missing" if text is None else "empty" if text == "" else f"{text!r:.60}"
            raise UserError(f"{where}: {spec.text_field} is {found}; text is expected (text_field names the field)",
                            param="data")  # fmt: skip
        lines.append((number, text))
    if not lines:
        raise UserError(f"{spec.data} holds no rows", param="data")
    return lines


def _gold(spec: LabelFile) -> list[ClassifyRow]:
    if spec.gold is None:
        return []
    rows = [row for row in read_pooling_rows(spec.gold, "classify") if isinstance(row, ClassifyRow)]
    if not any(name in row.answers for row in rows for name in spec.questions):
        raise UserError(f"gold: {spec.gold} answers none of the questions {', '.join(spec.questions)}", param="gold")
    return rows


def _left_out(spec: LabelFile, lines: list[tuple[int, str]], held_out: dict[str, str]) -> list[LeftOut]:
    equal = {text_key(text) for text in held_out.values()}
    known = {text_key(text): text for _, text in lines}
    judge = HeldOut(held_out, [text for key, text in known.items() if key not in equal])
    found = []
    for line, text in lines:
        match = judge.match(text)
        if match is None and spec.prompt is not None:
            match = judge.match(prompt_of(spec.prompt, text))
        if match is not None:
            found.append(LeftOut(line, match))
    return found


def _known(spec: LabelFile, rows: list[ClassifyRow]) -> dict[str, list[Known]]:
    found: dict[str, list[Known]] = {name: [] for name in spec.questions}
    for name, question in spec.questions.items():
        for row in rows:
            answer: Any = row.answers.get(name)
            if isinstance(answer, bool):
                answer = "yes" if answer else "no"
            if answer is not None and not isinstance(answer, tuple if question.several else str):
                names: dict[type, str] = {str: "one label", tuple: "a list"}
                kind = names.get(type(answer), "probabilities")
                raise UserError(
                    f"gold: {spec.gold} line {row.line} answers {name!r} with {kind}, and the label file has several: "
                    f"{str(question.several).lower()}, for which {'a list' if question.several else 'one label'} is "
                    "expected",
                    param="gold",
                )
            found[name].append(answer)
    return found
