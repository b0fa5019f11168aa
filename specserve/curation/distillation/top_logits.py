"""The teachers' most likely tokens at each token of the rows' answers, as the student names tokens.

A teacher that runs here reads each row's answer behind its own prompt; an endpoint told them with its answers, and they
are mapped to the student's tokens by their bytes. Both need the student's tokenizer, and are refused, by name, where
they have another one. What the file holds is `training.data.teacher_logits`'s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ...errors import ModelError, UserError
from ...model.config import ModelConfig
from ...model.fingerprint import tokenizer_fingerprint
from ...model.store import resolve_model
from ...teachers import Reading, Teacher, TeacherError, TeacherSpec, TopTokens
from ...teachers.local import LocalBackend
from ...text.special_tokens import eos_token_ids
from ...text.tokenizer import TextTokenizer
from ...training.data.dataset import Example, RowEncoder
from ...training.data.rows import parse_row
from ...training.data.teacher_logits import TopLogits
from ..progress import progress
from .choosing import Chosen
from .likely_tokens import as_logits, mixed
from .plan import MAX_TOP_LOGPROBS, DistillPlan
from .token_mapping import TokenMapping


@dataclass(slots=True)
class LogitsCounts:
    """What became of the rows' logits, for the summary."""

    rows: int = 0
    tokens: int = 0
    rows_without: int = 0  # whose tokens an endpoint divided in another way
    unmapped: int = 0  # likely tokens that the student's tokenizer does not have


class Student:
    """The model that will be trained, as far as its tokens go. Raises `UserError` where there is none."""

    def __init__(self, model: str):
        self.model_dir = resolve_model(model, None)
        self.tokenizer = TextTokenizer(self.model_dir)
        self.tokenizer_hash = tokenizer_fingerprint(self.model_dir)
        try:
            self.vocab_size = ModelConfig.from_dir(self.model_dir).vocab_size
        except ModelError as error:
            raise UserError(f"the student {model}: {error}", param="student") from None
        self._encoder = RowEncoder(self.tokenizer, eos_token_ids(self.model_dir))

    def example(self, row: dict[str, Any]) -> Example:
        """The row as the trainer will read it. Raises `UserError`."""
        return example_of(self._encoder, row)


def example_of(encoder: RowEncoder, row: dict[str, Any]) -> Example:
    """A row that has one answer to learn. Raises `UserError`."""
    (example,) = encoder.examples(parse_row(msgspec.json.encode(row).decode(), 1, "the row"))
    return example


def check_tokenizers(teachers: Sequence[Teacher], student: Student) -> None:
    """Raise `UserError` for a teacher that runs here and has another tokenizer, before it is asked anything."""
    for teacher in teachers:
        if isinstance(teacher.backend, LocalBackend):
            theirs = tokenizer_fingerprint(teacher.backend.tokenizer_dir)
            if theirs != student.tokenizer_hash:
                raise disagreement(teacher.spec, student.model_dir, f"{theirs[:12]} and {student.tokenizer_hash[:12]}")


def disagreement(spec: TeacherSpec, model_dir: Path, evidence: str) -> UserError:
    return UserError(
        f"the teacher {spec.name} has another tokenizer than the student {model_dir} ({evidence}), so its "
        "probabilities are of other tokens; take a teacher of the student's family, name the right "
        "--student, or leave out --top-logprobs and train on its answers alone",
        param="top_logprobs",
    )


async def read_here(
    plan: DistillPlan,
    teachers: Sequence[Teacher],
    student: Student,
    rows: Sequence[tuple[Chosen, dict[str, Any], Example]],
) -> list[TopLogits]:
    """Of each row what `teachers`, which run here, say of its answer; their mean where there are several."""
    num_top = plan.top_logprobs if len(teachers) == 1 else MAX_TOP_LOGPROBS
    found: list[list[TopTokens]] = [[] for _ in rows]
    for teacher in teachers:
        assert isinstance(teacher.backend, LocalBackend)
        backend = teacher.backend
        encoder = RowEncoder(backend.tokenizer(), eos_token_ids(backend.model_dir))
        readings = (_reading(plan, backend, encoder, chosen, row, example, num_top) for chosen, row, example in rows)
        with progress(f"logits {teacher.spec.name}", len(rows)) as bar:
            async with contextlib.aclosing(teacher.readings(readings)) as results:
                async for index, result in results:
                    if isinstance(result, TeacherError):
                        line = rows[index][0].prompt.line
                        raise UserError(f"{plan.data} line {line} cannot be read by its teacher: {result}")
                    found[index].append(result)
                    bar.update()
        if plan.num_local > 1:
            await teacher.unload()
    told = (tops[0] if len(tops) == 1 else mixed(tops) for tops in found)
    return [as_logits(top, plan.top_logprobs, student.vocab_size) for top in told]


def _reading(
    plan: DistillPlan,
    backend: LocalBackend,
    encoder: RowEncoder,
    chosen: Chosen,
    row: dict[str, Any],
    example: Example,
    num_top: int,
) -> Reading:
    """The student's tokens of the answer behind the teacher's own prompt."""
    context = _context(backend.as_taken(chosen.prompt.asked(plan.system)))
    asked = {"messages": [*context, row["messages"][-1]]}
    prompt = example_of(encoder, asked).prompt
    return Reading((*prompt, *example.completion), len(prompt), num_top)


def _context(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [{**message, "weight": 0} if message["role"] == "assistant" else message for message in messages]


def told_by_endpoints(
    plan: DistillPlan,
    student: Student,
    rows: Sequence[tuple[Chosen, dict[str, Any], Example]],
    counts: LogitsCounts,
) -> list[TopLogits]:
    """Of each row what its teacher said with its answer. Raises `UserError` where most do not fit the student."""
    mapping = TokenMapping(student.tokenizer)
    found: list[TopLogits] = []
    evidence: dict[str, str] = {}
    for chosen, _, example in rows:
        assert chosen.candidate is not None
        logits, problem = mapping.logits(chosen.candidate.answer, example.completion, plan.top_logprobs)
        counts.rows_without += logits is None
        if problem is not None:
            evidence.setdefault(chosen.candidate.teacher, problem)
        found.append(logits if logits is not None else _nothing(plan.top_logprobs))
    counts.unmapped = mapping.num_unmapped
    if rows and counts.rows_without * 2 > len(rows):
        name = next(iter(evidence))
        spec = next(spec for spec in plan.teachers if spec.name == name)
        shown = f"{counts.rows_without} of {len(rows)} answers are other tokens: {evidence[name]}"
        raise disagreement(spec, student.model_dir, shown)
    return found


def _nothing(num_top: int) -> TopLogits:
    return TopLogits(np.zeros((0, num_top), np.int32), np.zeros((0, num_top), np.float16))
