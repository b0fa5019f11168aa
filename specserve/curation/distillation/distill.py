"""From prompts to training rows: teachers answer, the best answers are chosen, rows and a summary are written.

Nothing is written before all is there, and then whole: what interrupts a run costs what was in flight alone, since the
teachers' cache has the rest, and the same plan goes on from there. The rows are put in their place last.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...errors import UserError
from ...teachers import Budget, Teacher, TeacherSpec, Usage, open_teacher
from ...training.data.dataset import Example
from ...training.data.teacher_logits import TopLogits, logits_file, write_teacher_logits
from ..held_output import check_writable, held
from .answers import Asking
from .choosing import Chosen, choose, way_of
from .held_out import without_held_out
from .plan import DistillPlan
from .prompts import read_prompts
from .summary import Summary, summary_of
from .top_logits import LogitsCounts, Student, check_tokenizers, read_here, told_by_endpoints

Row = tuple[Chosen, dict[str, Any], Example]


class Distillation:
    """One run of a plan. `usages` say by teacher what was asked so far, also where `run` raises.

    Raises `UserError` for what cannot be done, before anybody is asked.
    """

    def __init__(self, plan: DistillPlan):
        plan.check()
        self.plan = plan
        self._prompts, self._held_out = without_held_out(read_prompts(plan.data, plan.max_rows), plan.held_out)
        self._way = way_of(plan, self._prompts)
        self._student = Student(plan.student) if plan.top_logprobs else None
        self.usages: dict[str, Usage] = {}

    async def run(self) -> Summary:
        """Ask, choose and write. Raises `UserError`; `TeacherError` where a teacher cannot be asked any more."""
        out = self.plan.out
        with held(out, out.with_name(out.name + ".lock"), "out"):  # two that ask the same at once pay twice
            beside = [self.plan.summary_file, *([logits_file(out)] if self._student is not None else [])]
            check_writable(out, beside, self.plan.data.stat().st_size, "out")
            return await self._run()

    async def _run(self) -> Summary:
        start, budget = time.monotonic(), Budget(self.plan.max_cost)
        async with contextlib.AsyncExitStack() as stack:

            async def opened(spec: TeacherSpec, name: str) -> Teacher:
                teacher = await stack.enter_async_context(open_teacher(spec, budget))
                self.usages[name] = teacher.usage
                return teacher

            teachers = [await opened(spec, spec.name) for spec in self.plan.teachers]
            judge = None if self.plan.judge is None else await opened(self.plan.judge, f"judge {self.plan.judge.name}")
            if self._student is not None:
                check_tokenizers(teachers, self._student)
            answered = await Asking(self.plan, self._prompts, teachers).all()
            chosen = await choose(self.plan, self._way, self._prompts, answered, judge)
            if judge is not None and self.plan.num_local > 1:
                await judge.unload()
            counts, rows, logits = await self._with_logits(chosen, teachers)
        if not rows:
            kind, why = next(one.dropped for one in chosen if one.dropped is not None)
            raise UserError(f"no row is left of {len(chosen)} prompts; the first was dropped as {kind}: {why}")
        chosen = sorted([*chosen, *self._held_out], key=lambda one: one.prompt.line)
        summary = summary_of(self.plan, self._way, chosen, self.usages, counts, time.monotonic() - start)
        await asyncio.to_thread(write, self.plan, rows, logits, self._student, summary)
        return summary

    async def _with_logits(
        self, chosen: list[Chosen], teachers: Sequence[Teacher]
    ) -> tuple[LogitsCounts | None, list[dict[str, Any]], list[TopLogits]]:
        """The rows, and of each what its teachers say of its tokens, where that is wanted.

        Answers that the student's chat template cannot hold are dropped in `chosen`.
        """
        if self._student is None:
            return None, [one.prompt.row(one.candidate.text) for one in chosen if one.candidate is not None], []
        counts, rows = LogitsCounts(), list[Row]()
        for at, one in enumerate(chosen):
            if one.candidate is not None:
                row = one.prompt.row(one.candidate.text)
                try:
                    rows.append((one, row, self._student.example(row)))
                except UserError as error:
                    chosen[at] = Chosen(one.prompt, None, one.score, ("not for the student", str(error)))
        if self.plan.teachers[0].url is None:
            logits = await read_here(self.plan, teachers, self._student, rows)
        else:
            logits = told_by_endpoints(self.plan, self._student, rows, counts)
        counts.rows, counts.tokens = len(rows) - counts.rows_without, sum(map(len, logits))
        return counts, [row for _, row, _ in rows], logits


def write(
    plan: DistillPlan,
    rows: Sequence[dict[str, Any]],
    logits: Sequence[TopLogits],
    student: Student | None,
    summary: Summary,
) -> None:
    """Put rows, logits and summary in their places, the rows last: where they are, the others are.

    Raises `UserError` where they cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=plan.out.parent, prefix=f".{plan.out.name}.") as folder:
            staged = Path(folder) / plan.out.name
            staged.write_bytes(b"".join(msgspec.json.encode(row) + b"\n" for row in rows))
            if student is not None:
                beside = write_teacher_logits(staged, student.tokenizer_hash, logits)
                os.replace(beside, logits_file(plan.out))
            told = Path(folder) / plan.summary_file.name
            told.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n")
            os.replace(told, plan.summary_file)
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(staged, plan.out)
    except OSError as error:
        raise UserError(
            f"cannot write {plan.out}: {error.strerror or error}; make room, or give another file: all answers are "
            "kept, and the same command asks nothing twice",
            param="out",
        ) from None
