"""Prompts that a model itself takes for a user's: what a head of the bare base can learn from where nobody has any.

Each is asked for with a seed of its own number, so the same run asks the same, which the teacher's cache answers: a run
that was stopped goes on when it is started again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError, shortened
from ..teachers import Answer, Ask, Budget, Teacher, TeacherError, TeacherSpec, open_teacher
from ..teachers.local import LocalBackend
from ..training.data.near_duplicates import NearDuplicates
from .contamination import HeldOut
from .held_output import check_writable, held
from .synthesis.review import put_lines
from .synthesis.seeds import read_held_out

ROUND = 256  # prompts that are asked for at a time, and fewer where fewer are missing
_LEAST_ROUND = 16
_TOP_P = 0.95
_LEAST_CHARS = 12
_LEAST_NEW = 0.02  # of a round; below it nothing new comes
_IDLE_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `specserve prompts` is told, but for its teacher."""

    out: Path
    rows: int
    held_out: tuple[Path, ...] = ()
    near: float = 0.7
    max_tokens: int = 96
    temperature: float = 1.0
    seed: int = 0


@dataclass(slots=True)
class Found:
    """`dropped` counts by reason what was no prompt; `ended` says why there are fewer than were wanted."""

    prompts: list[str] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    ended: str = ""

    @property
    def num_asked(self) -> int:
        return len(self.prompts) + self.dropped.total()


def write_own_prompts(options: Options, spec: TeacherSpec, budget: Budget, say: Callable[[str], object]) -> Found:
    """Rows of one user's message each, into a file that is not there yet. Raises `UserError`."""
    if spec.url is not None:
        raise UserError(
            f"--teacher {spec.name} is an endpoint, which answers users and cannot be asked what they say; give a "
            "model that runs here (default, or a directory)",
            param="teacher",
        )
    out = options.out
    held_out = read_held_out(options.held_out)
    known = HeldOut(held_out, (), options.near) if held_out else None
    search = _Search(options, known, say)
    with held(out, out.with_name(out.name + ".lock"), "out"):
        if out.exists():
            raise UserError(f"--output {out} is there already; give another file, or remove it", param="out")
        check_writable(out, (), options.rows * 4 * options.max_tokens, "out")
        found = asyncio.run(_asked(search, spec, budget))
        if not found.prompts:
            raise UserError(f"none of {found.num_asked} texts is a prompt: {told(found.dropped)}", param="teacher")
        rows = [{"messages": [{"role": "user", "content": prompt}]} for prompt in found.prompts]
        put_lines(out, rows)
    return found


def told(dropped: Counter[str]) -> str:
    return ", ".join(f"{num} {reason}" for reason, num in dropped.most_common()) or "none dropped"


class _Search:
    def __init__(self, options: Options, held_out: HeldOut | None, say: Callable[[str], object]):
        self._options, self._held_out, self._say = options, held_out, say
        self._near = NearDuplicates(options.near)
        self.found = Found()

    async def run(self, teacher: Teacher) -> Found:
        found, number, num_idle = self.found, 0, 0
        while (missing := self._options.rows - len(found.prompts)) and num_idle < _IDLE_ROUNDS:
            num = min(ROUND, max(_LEAST_ROUND, 2 * missing))
            for result in await teacher.first_answers([self._ask(each) for each in range(number, number + num)]):
                if len(found.prompts) == self._options.rows:
                    break
                if (reason := self._problem(result)) is not None:
                    found.dropped[reason] += 1
                    continue
                assert isinstance(result, Answer)
                text = result.text.strip()
                self._near.add(str(len(found.prompts)), text)
                found.prompts.append(text)
            number += num
            num_new = missing - self._options.rows + len(found.prompts)
            num_idle = num_idle + 1 if num_new < _LEAST_NEW * num else 0
            self._say(f"{len(found.prompts)} of {self._options.rows} prompts; dropped: {told(found.dropped)}")
        if len(found.prompts) < self._options.rows:
            found.ended = f"the last {_IDLE_ROUNDS} rounds of texts brought nothing new"
        return found

    def _ask(self, number: int) -> Ask:
        options = self._options
        return Ask(
            messages=(),
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            top_p=_TOP_P if options.temperature else 1.0,
            seed=options.seed * 1_000_003 + number,
        )

    def _problem(self, result: Answer | TeacherError) -> str | None:
        """Why it is no prompt to learn from."""
        if isinstance(result, TeacherError):
            return shortened(result)
        text = result.text.strip()
        if result.finish_reason != "stop":
            return f"longer than {self._options.max_tokens} tokens"
        if len(text) < _LEAST_CHARS:
            return "too short"
        if self._near.nearest(text) is not None:
            return "near another"
        if self._held_out is not None and self._held_out.match(text) is not None:
            return "held out"
        return None


async def _asked(search: _Search, spec: TeacherSpec, budget: Budget) -> Found:
    async with open_teacher(spec, budget) as teacher:
        assert isinstance(teacher.backend, LocalBackend)
        await asyncio.to_thread(teacher.backend.user_turn)  # before the model is loaded for it
        return await search.run(teacher)
