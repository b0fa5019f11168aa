"""What all teachers answer to all prompts, without what is of no use: cut off, empty, or not of the schema.

Teachers at endpoints are asked side by side, those that run here one after the other, so that one model is in memory.
When one cannot be asked any more, the others finish what is in flight and are asked no more either.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from ...errors import UserError, shortened
from ...teachers import Answer, Ask, NoAnswerError, NotAskedError, Teacher, TeacherError, TeacherSpec, Usage
from ..answer_schema import AnswerSchema
from ..progress import progress
from .plan import DistillPlan
from .prompts import Prompt


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer that could be a row's; `text` is how it would be written there."""

    text: str
    answer: Answer
    teacher: str


@dataclass(slots=True)
class Answered:
    """Of one prompt: candidates by teacher and sample, and why others are none."""

    candidates: list[Candidate] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)  # (kind of reason, what it is)


class Asking:
    """The teachers of a plan, opened, and what they have answered so far."""

    def __init__(self, plan: DistillPlan, prompts: Sequence[Prompt], teachers: Sequence[Teacher]):
        self._plan, self._prompts, self._teachers = plan, prompts, teachers
        self._schema = AnswerSchema(plan.schema) if plan.schema is not None else None
        self._stopped = False
        self._found: list[list[Answered]] = [[Answered() for _ in teachers] for _ in prompts]

    async def all(self) -> list[Answered]:
        """What there is of each prompt. Raises `TeacherError` where a teacher cannot be asked any more."""
        numbers = range(len(self._teachers))
        hosted = [self._ask(number) for number in numbers if self._plan.teachers[number].url is not None]
        for result in await asyncio.gather(*hosted, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
        for number in numbers:
            if self._plan.teachers[number].url is None:
                await self._ask(number)
                if self._plan.num_local > 1:
                    await self._teachers[number].unload()
        return [_joined(parts) for parts in self._found]

    async def _ask(self, number: int) -> None:
        teacher = self._teachers[number]
        try:
            with progress(teacher.spec.name, len(self._prompts)) as bar:
                async with contextlib.aclosing(teacher.answers(self._asks(teacher.spec))) as results:
                    async for index, result in results:
                        self._note(self._found[index][number], result, teacher.spec.name)
                        show_cost(bar, teacher.usage)
        except BaseException:
            self._stopped = True
            raise

    def _asks(self, spec: TeacherSpec) -> Iterator[Ask]:
        plan = self._plan
        seed = 0 if plan.seed is None and spec.url is None and plan.sampled_at > 0 else plan.seed
        for prompt in self._prompts:
            if self._stopped:
                return
            yield Ask(
                prompt.asked(plan.system),
                plan.max_tokens,
                temperature=plan.sampled_at,
                top_p=plan.top_p,
                n=plan.samples,
                seed=seed,
                schema=plan.schema,
                top_logprobs=plan.top_logprobs if spec.url is not None else 0,
            )

    def _note(self, found: Answered, result: list[Answer] | TeacherError, teacher: str) -> None:
        if isinstance(result, NotAskedError):
            found.refused.append(("not asked", str(result)))
            return
        if isinstance(result, TeacherError):
            kind = "refused or empty" if isinstance(result, NoAnswerError) else "the teacher failed"
            found.refused.append((kind, shortened(result)))
            return
        if missing := self._plan.samples - len(result):
            found.refused.append(("refused or empty", f"{missing} of {self._plan.samples} answers did not come"))
        for answer in result:
            text = answer.text.strip()
            if answer.finish_reason == "length":
                found.refused.append(("cut off", f"at {self._plan.max_tokens} tokens (--max-tokens)"))
            elif not text:
                found.refused.append(("empty", "the answer is empty"))
            else:
                self._check(found, Candidate(text, answer, teacher))

    def _check(self, found: Answered, candidate: Candidate) -> None:
        if self._schema is None:
            found.candidates.append(candidate)
            return
        try:
            text = self._schema.normal(candidate.text)
        except UserError as error:
            found.refused.append(("not of the schema", shortened(error)))
            return
        found.candidates.append(Candidate(text, candidate.answer, candidate.teacher))


def _joined(parts: Sequence[Answered]) -> Answered:
    return Answered(
        [candidate for part in parts for candidate in part.candidates],
        [reason for part in parts for reason in part.refused],
    )


def main_reason(refused: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """The reason that most answers have for not being there, as (kind, what it is)."""
    ((kind, _),) = Counter(kind for kind, _ in refused).most_common(1)
    return next(reason for reason in refused if reason[0] == kind)


def show_cost(bar: tqdm, usage: Usage) -> None:
    shown = {"cached": usage.cached, "failed": usage.failed, "cost": f"{usage.cost:.4f}" if usage.cost else 0}
    bar.set_postfix({name: value for name, value in shown.items() if value}, refresh=False)
    bar.update()
