"""Which answer to a prompt becomes its row: the best by a reference, by agreement or by a judge, if any is good.

Owns the rule of `--best-by auto` and what is dropped for its score; how a score is made is scores.py's and judge.py's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import UserError
from ...teachers import Teacher, TeacherError
from ..progress import progress
from .answers import Answered, Candidate, main_reason, show_cost
from .judge import judging, mark_of
from .plan import DistillPlan
from .prompts import Prompt
from .scores import agreement_scores, best_of, metric_score

Scores = list[list[float | None]]
Way = Literal["metric", "agreement", "judge", "first"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The row of one prompt, or why there is none: (kind of reason, what it is)."""

    prompt: Prompt
    candidate: Candidate | None
    score: float | None = None
    dropped: tuple[str, str] | None = None


def way_of(plan: DistillPlan, prompts: Sequence[Prompt]) -> Way:
    """How the best is found. Raises `UserError` where the rows do not have what that needs."""
    without = next((prompt for prompt in prompts if prompt.reference is None), None)
    if plan.best_by == "metric" and without is not None:
        raise UserError(
            f"{plan.data} line {without.line} has no answer to compare with; --best-by metric needs one in every row",
            param="best_by",
        )
    if plan.best_by != "auto":
        return plan.best_by
    if plan.judge is not None:
        return "judge"
    if without is None and (plan.num_asked > 1 or plan.min_score is not None):
        return "metric"
    return "agreement" if plan.num_asked > 1 else "first"


async def choose(
    plan: DistillPlan, way: Way, prompts: Sequence[Prompt], found: Sequence[Answered], judge: Teacher | None
) -> list[Chosen]:
    """One for each prompt, in their order. Raises `TeacherError` where the judge cannot be asked any more."""
    scores: Scores
    if way == "judge":
        assert judge is not None
        scores = await judged_scores(judge, prompts, found)
    elif way == "metric":
        scores = [
            [metric_score(candidate.text, prompt.reference or "") for candidate in answered.candidates]
            for prompt, answered in zip(prompts, found, strict=True)
        ]
    elif way == "agreement":
        scores = [
            agreement_scores([candidate.text for candidate in answered.candidates], plan.num_asked)
            for answered in found
        ]
    else:
        scores = [[None] * len(answered.candidates) for answered in found]
    return [
        _chosen(plan, way, prompt, answered, of_prompt)
        for prompt, answered, of_prompt in zip(prompts, found, scores, strict=True)
    ]


def _chosen(plan: DistillPlan, way: Way, prompt: Prompt, answered: Answered, scores: Sequence[float | None]) -> Chosen:
    if not answered.candidates:
        return Chosen(prompt, None, dropped=main_reason(answered.refused))
    if way == "judge" and all(score is None for score in scores):
        return Chosen(prompt, None, dropped=("not judged", "the judge gave no mark"))
    best = 0 if way == "first" else best_of([candidate.text for candidate in answered.candidates], scores)
    score = scores[best]
    if plan.min_score is not None and score is not None and score < plan.min_score:
        return Chosen(prompt, None, score, ("score too low", f"{score:.3f} by {way}; --min-score is {plan.min_score}"))
    return Chosen(prompt, answered.candidates[best], score)


async def judged_scores(judge: Teacher, prompts: Sequence[Prompt], found: Sequence[Answered]) -> Scores:
    """Of all candidates; None where the judge failed or gave no mark."""
    texts = [list(dict.fromkeys(candidate.text for candidate in answered.candidates)) for answered in found]
    places = [(at, text) for at, of_prompt in enumerate(texts) for text in of_prompt]
    marks: dict[tuple[int, str], float | None] = {}
    asks = (judging(prompts[at], text) for at, text in places)
    with progress(f"judge {judge.spec.name}", len(places)) as bar:
        async with contextlib.aclosing(judge.answers(asks)) as results:
            async for index, result in results:
                marks[places[index]] = None if isinstance(result, TeacherError) else mark_of(result[0])
                show_cost(bar, judge.usage)
    return [[marks[at, candidate.text] for candidate in answered.candidates] for at, answered in enumerate(found)]
