"""The review file: every candidate with its verdict and reason, one JSON object a line.

It is the only state of a synthesis: what was made is read from it when the run goes on, and a person may edit `keep`
and `row` before the rows are written. The first line says with which settings the run was begun; a run goes on with no
others. Written whole after each round, so that it is never cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from ...errors import UserError
from ...training.data.rows import parse_object, row_texts
from ...whole_files import replace_file
from .row_shapes import Input, kind_of, read_pair

Verdict = Literal[
    "kept",
    "malformed",  # the teacher's answer is not what was asked for
    "other_form",  # the input does not begin as all seeds do
    "duplicate",
    "near_duplicate",
    "held_out",
    "too_short",
    "too_long",
    "not_of_schema",
    "unfinished",  # the answer was longer than it may be
    "criticised",
    "teacher_error",  # asked again when the run goes on
    "surplus",  # enough rows were there; answered first once more are wanted
]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What decides which candidates come; hashes stand for files. The number of rows is not among it: it may grow."""

    kind: str
    task: str
    teacher: str
    seeds: str
    schema: str | None
    held_out: tuple[str, ...]
    method: Literal["single", "refine"]
    inputs_only: bool
    examples: int
    per_ask: int
    vary: tuple[str, ...]
    near: float
    min_tokens: int | None
    max_tokens: int | None
    max_answer_tokens: int | None
    model: str | None
    temperature: float
    seed: int


class Candidate(msgspec.Struct, kw_only=True):
    """One input that a teacher proposed, and what became of it; without an input where what it wrote was none.

    `is_new`: it was unlike seeds, held-out rows and what was new before. `proposed` is the input before a critique.
    """

    id: int
    round: int
    ask: int
    keep: bool = False
    verdict: Verdict
    reason: str = ""
    row: dict[str, Any] | None = None
    input: Input | None = None
    is_new: bool = False
    proposed: Input | None = None
    system: str | None = None
    critique: str | None = None
    teacher_wrote: str | None = None  # where it was malformed


class _Head(msgspec.Struct, frozen=True):
    synthesis: Settings


def write_review(path: Path, settings: Settings, candidates: Sequence[Candidate]) -> None:
    put_lines(path, [_Head(settings), *candidates])


def put_lines(path: Path, values: Sequence[Any]) -> None:
    """One JSON line for each value, in place of what `path` held. Raises `UserError` where that is not possible."""
    content = b"".join(msgspec.json.encode(value) + b"\n" for value in values)
    try:
        replace_file(path, lambda new: new.write_bytes(content), sync=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", param="out") from None


def read_review(path: Path) -> tuple[Settings, list[Candidate]]:
    """Raises `UserError` that names the line."""
    head: Settings | None = None
    candidates: list[Candidate] = []
    for line, text in row_texts(path):
        where = f"{path} line {line}"
        value = parse_object(text, where)
        try:
            if head is None:
                head = msgspec.convert(value, _Head).synthesis
            else:
                candidates.append(candidate := msgspec.convert(value, Candidate))
                if candidate.keep and candidate.row is None:
                    raise UserError(f"{where} is kept and has no row; write one, or set keep to false", param="review")
        except msgspec.ValidationError as error:
            what = "the first line of a review file" if head is None else "a candidate"
            raise UserError(f"{where} is not {what}: {error}", param="review") from None
    if head is None:
        raise UserError(f"{path} is empty; a review file begins with the settings of its run", param="review")
    return head, candidates


def check_same(path: Path, begun: Settings, now: Settings) -> None:
    """Raises `UserError` that names a setting in which a run would go on otherwise than it was begun."""
    for name in Settings.__struct_fields__:
        before, after = getattr(begun, name), getattr(now, name)
        if before != after:
            raise UserError(
                f"{path} is of a run with {name} {_shown(before)}, now it is {_shown(after)}; give another --output, "
                "or remove that file to begin anew (what the teacher has answered before costs nothing again)",
                param=name,
            )


def reviewed_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that a review file keeps, as a person left them. Raises `UserError` that names the line."""
    settings, candidates = read_review(path)
    rows = []
    for candidate in candidates:
        if not candidate.keep or candidate.row is None:
            continue
        where = f"{path}: candidate {candidate.id}"
        if not settings.inputs_only:
            read_pair(candidate.row, kind_of(candidate.row, where), candidate.id, where)
        rows.append(candidate.row)
    if not rows:
        raise UserError(f"{path} keeps none of its {len(candidates)} candidates", param="review")
    return rows


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}... "
