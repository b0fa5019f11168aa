"""A synthesis, round after round: inputs are proposed, judged, answered and judged again, until there are enough rows.

A round's asks follow from the settings and from what the rounds before it made, and its results are taken in the order
of its asks. So a run that is stopped anywhere goes on from its review file: the round that was under way is asked
again, and what the teacher had answered of it comes from the teacher's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError, shortened
from ...teachers import Answer, Ask, Teacher, TeacherError
from .asks import Asks
from .judge import Dropped, Judge
from .prompts import Prompts
from .review import Candidate, Settings, Verdict, write_review
from .row_shapes import Input
from .seeds import Seeds

MAX_ASKS = 64  # of a round: little is lost if a run ends in it
_LEAST_NEW = 0.02  # rows for each proposal of a round; below it nothing new comes
_IDLE_ROUNDS = 2  # so many such rounds end a run
_TRIES = 12  # answers or proposals of which none can be used end it, too, and as many failures
_KEPT_TEXT = 2000  # characters of an answer that is no row
_NO_ROW: tuple[Verdict, ...] = ("not_of_schema", "unfinished", "malformed")
_WAITING = "enough rows were there before its turn"


@dataclass(slots=True)
class Outcome:
    """`ended` says why there are fewer rows than were wanted; `num_failed` requests have no answer."""

    candidates: list[Candidate]
    ended: str = ""
    num_failed: int = 0
    last_error: str = ""

    @property
    def rows(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.keep]


class Synthesis:
    """A run that `candidates` begin, as its review file holds them; `say` gets a line after each round."""

    def __init__(
        self,
        settings: Settings,
        seeds: Seeds,
        judge: Judge,
        teacher: Teacher,
        review: Path,
        candidates: Sequence[Candidate] = (),
        say: Callable[[str], object] = lambda line: None,
    ):
        self._settings, self._shape, self._judge, self._teacher = settings, seeds.shape, judge, teacher
        self._review, self._say = review, say
        self._prompts = Prompts(seeds.shape, settings.task)
        self._asks = Asks(settings, seeds, self._prompts)
        self._out = Outcome(list(candidates))
        self._next_ask = 1 + max((candidate.ask for candidate in candidates), default=-1)
        self._next_id = 1 + max((candidate.id for candidate in candidates), default=0)
        self._round = max((candidate.round for candidate in candidates), default=0)
        self._num_asked = 0
        for candidate in candidates:
            if candidate.is_new and candidate.input is not None:
                judge.add(_key(candidate), candidate.proposed or candidate.input)
                if candidate.proposed is not None:
                    judge.add(_refined_key(candidate), candidate.input)

    async def run(self, num_rows: int) -> Outcome:
        """Until `num_rows` are kept or nothing new comes. Raises `UserError` where no row can come of it."""
        out, num_idle = self._out, 0
        waiting = [candidate for candidate in out.candidates if candidate.verdict in ("surplus", "teacher_error")]
        while (num_kept := len(out.rows)) < num_rows:
            self._round += 1
            num_asked, num_failed = self._num_asked, out.num_failed
            new = await self._proposed(num_rows - num_kept - len(waiting))
            out.candidates += new
            waiting += [candidate for candidate in new if candidate.is_new and candidate.verdict == "surplus"]
            chosen, waiting = waiting[: num_rows - num_kept], waiting[num_rows - num_kept :]
            await self._completed(chosen)
            write_review(self._review, self._settings, out.candidates)
            num_now = len(out.rows)
            self._say(self._line(new, num_now - num_kept, num_rows))
            self._check_use()
            num_idle = num_idle + 1 if num_now - num_kept < max(1, _LEAST_NEW * len(new)) else 0
            num = self._num_asked - num_asked
            if num == out.num_failed - num_failed and (num >= _TRIES or num_idle == _IDLE_ROUNDS):
                raise UserError(
                    f"the teacher answered none of {num} requests: {out.last_error}; what was made before is in "
                    f"{self._review}, and the same command goes on"
                )
            if num_idle == _IDLE_ROUNDS:
                out.ended = (
                    f"the last {_IDLE_ROUNDS} rounds brought nothing new: the teacher repeats itself or the seeds, or "
                    f"its rows are dropped ({self._review} says why)"
                )
                break
        return out

    # -- proposals

    async def _proposed(self, num_wanted: int) -> list[Candidate]:
        """Candidates of new asks; those that are new wait for their answers as `surplus`."""
        if num_wanted <= 0:
            return []
        first, self._next_ask = self._next_ask, self._next_ask + self._num_asks(num_wanted)
        numbers = range(first, self._next_ask)
        results = await self._answers([self._asks.proposal(number) for number in numbers])
        new: list[Candidate] = []
        for number, result in zip(numbers, results, strict=True):
            if isinstance(result, Answer):
                new += self._read(number, result)
        return new

    def _num_asks(self, num_wanted: int) -> int:
        """As many as should bring so many rows, by what asks have brought so far."""
        num_proposed = sum(candidate.input is not None for candidate in self._out.candidates)
        share = max(0.1, len(self._out.rows) / num_proposed) if num_proposed else 1.0
        return min(MAX_ASKS, math.ceil(num_wanted / share / self._settings.per_ask))

    def _read(self, number: int, answer: Answer) -> list[Candidate]:
        try:
            if answer.finish_reason == "length":
                raise UserError(f"it does not end within {answer.completion_tokens or 'its'} tokens")
            inputs = self._prompts.read_inputs(answer.text, self._settings.per_ask)
        except UserError as error:
            candidate = self._candidate(number, "malformed", shortened(error))
            candidate.teacher_wrote = answer.text[:_KEPT_TEXT]
            return [candidate]
        system = self._asks.examples(number)[0].system
        candidates = []
        for input in inputs:
            candidate = self._candidate(number, "surplus", _WAITING)
            candidate.input, candidate.system = input, system
            candidates.append(candidate)
            try:
                self._judge.check_input(input)
            except Dropped as dropped:
                _drop(candidate, dropped.verdict, dropped)
            else:
                candidate.is_new = True
                self._judge.add(_key(candidate), input)
        return candidates

    # -- rows

    async def _completed(self, chosen: Sequence[Candidate]) -> None:
        """Answer new inputs, criticise and refine the rows, and say of each candidate what became of it."""
        answers: dict[int, str | None] = {}
        if self._settings.inputs_only:
            for candidate in chosen:
                if self._is_kept(candidate, None):
                    answers[candidate.id] = None
        else:
            results = await self._answers([self._asks.answer(_input(each), each.system) for each in chosen])
            for candidate, result in zip(chosen, results, strict=True):
                if isinstance(result, TeacherError):
                    _drop(candidate, "teacher_error", result)
                elif self._is_answered(candidate, result):
                    answers[candidate.id] = result.text
        if self._settings.method == "refine":
            await self._refine([(each, answers[each.id]) for each in chosen if each.id in answers])

    def _is_answered(self, candidate: Candidate, result: Answer) -> bool:
        if result.finish_reason == "length":
            limit = self._asks.max_answer_tokens
            _drop(candidate, "unfinished", f"the answer does not end within {limit} tokens (--max-answer-tokens)")
            candidate.teacher_wrote = result.text[:_KEPT_TEXT]
            return False
        return self._is_kept(candidate, result.text)

    def _is_kept(self, candidate: Candidate, answer: str | None) -> bool:
        """Whether `answer` makes a row of the candidate, which it then has."""
        input = _input(candidate)
        try:
            if answer is None:
                self._judge.check_whole(input)
            checked = None if answer is None else self._judge.checked_answer(input, answer)
            row = self._shape.row(input, checked, candidate.system)
        except (Dropped, UserError) as error:
            _drop(candidate, error.verdict if isinstance(error, Dropped) else "malformed", error)
            candidate.teacher_wrote = None if answer is None else answer[:_KEPT_TEXT]
            return False
        candidate.keep, candidate.verdict, candidate.reason, candidate.row = True, "kept", "", row
        return True

    # -- critique

    async def _refine(self, rows: Sequence[tuple[Candidate, str | None]]) -> None:
        """A row that its critique does not find good is written once more, and judged as a new one."""
        results = await self._answers([self._asks.critique(_input(each), answer) for each, answer in rows])
        to_fix: list[tuple[Candidate, str | None, str]] = []
        for (candidate, answer), result in zip(rows, results, strict=True):
            if isinstance(result, TeacherError):
                _drop(candidate, "teacher_error", result)
                continue
            try:
                critique, verdict = self._prompts.read_critique(result.text)
            except UserError as error:
                candidate.critique = f"none that can be read: {shortened(error)}"
                continue
            candidate.critique = critique
            if verdict == "drop":
                _drop(candidate, "criticised", critique)
            elif verdict == "fix":
                to_fix.append((candidate, answer, critique))
        refinements = [self._asks.refinement(_input(each), answer, critique) for each, answer, critique in to_fix]
        for (candidate, answer, _), result in zip(to_fix, await self._answers(refinements), strict=True):
            if isinstance(result, TeacherError):
                _drop(candidate, "teacher_error", result)
            else:
                self._take_refined(candidate, result, answer is not None)

    def _take_refined(self, candidate: Candidate, result: Answer, has_answer: bool) -> None:
        try:
            input, answer = self._prompts.read_refined(result.text, has_answer)
            self._judge.check_input(input, but=_key(candidate))
        except UserError as error:
            _drop(candidate, "malformed", f"refined: {error}")
            candidate.teacher_wrote = result.text[:_KEPT_TEXT]
        except Dropped as dropped:
            _drop(candidate, dropped.verdict, f"refined: {dropped}")
        else:
            if input != candidate.input:
                self._judge.add(_refined_key(candidate), input)
                candidate.proposed, candidate.input = candidate.input, input
            self._is_kept(candidate, answer)

    # -- asking and telling

    async def _answers(self, asks: Sequence[Ask]) -> list[Answer | TeacherError]:
        """One for each ask, in their order."""
        results = await self._teacher.first_answers(asks)
        self._num_asked += len(asks)
        errors = [result for result in results if isinstance(result, TeacherError)]
        self._out.num_failed += len(errors)
        self._out.last_error = shortened(errors[-1]) if errors else self._out.last_error
        return results

    def _candidate(self, ask: int, verdict: Verdict, reason: str) -> Candidate:
        candidate = Candidate(id=self._next_id, round=self._round, ask=ask, verdict=verdict, reason=reason)
        self._next_id += 1
        return candidate

    def _check_use(self) -> None:
        """Raises `UserError` where nothing that the teacher writes can be used, and more of it would only cost."""
        candidates = self._out.candidates
        if len(candidates) >= _TRIES and all(candidate.input is None for candidate in candidates):
            raise UserError(
                f"none of the teacher's {len(candidates)} proposals can be read; the last: {candidates[-1].reason}; "
                f"all are in {self._review}; a small teacher does better with --per-ask 1"
            )
        failed = [candidate for candidate in candidates if candidate.is_new and candidate.verdict in _NO_ROW]
        if len(failed) >= _TRIES and not self._out.rows:
            raise UserError(
                f"none of the teacher's {len(failed)} answers makes a row; the last: {failed[-1].reason}; all are in "
                f"{self._review}"
            )

    def _line(self, new: Sequence[Candidate], num_rows: int, num_wanted: int) -> str:
        num_repeated = sum(candidate.verdict in ("duplicate", "near_duplicate") for candidate in new)
        failed = f", {self._out.num_failed} requests failed so far" if self._out.num_failed else ""
        return (
            f"round {self._round}: {len(new)} proposed, {num_repeated} of them repeat others, {num_rows} rows; "
            f"{len(self._out.rows)} of {num_wanted}{failed}"
        )


def _key(candidate: Candidate) -> str:
    return f"candidate {candidate.id}"


def _refined_key(candidate: Candidate) -> str:
    return f"candidate {candidate.id}, refined"


def _input(candidate: Candidate) -> Input:
    assert candidate.input is not None
    return candidate.input


def _drop(candidate: Candidate, verdict: Verdict, reason: object) -> None:
    candidate.keep, candidate.verdict, candidate.reason, candidate.row = False, verdict, shortened(reason), None
