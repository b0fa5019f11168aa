"""How good answers are: by a reference, or by how much they agree with each other; from 0 to 1.

Agreement is minimum Bayes risk decoding (Kumar and Byrne 2004): the answer that is nearest to all others by the task's
metric, which for answers that are equal or not is the majority's. Differs from it in that an answer which did not come,
or was dropped, agrees with none.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...training.evaluation.task_metrics import task_metrics


def metric_score(answer: str, reference: str) -> float:
    """The task's main metric of one answer."""
    if answer.strip() == reference.strip():
        return 1.0
    return task_metrics([answer], [reference])["main"]


def agreement_scores(answers: Sequence[str], num_asked: int) -> list[float | None]:
    """The mean likeness of each answer to the others of `num_asked`; None where there is no other."""
    if num_asked < 2:
        return [None] * len(answers)
    likeness: dict[tuple[str, str], float] = {}

    def like(first: str, second: str) -> float:
        """The metric both ways: it counts the fields of its reference alone."""
        key = (min(first, second), max(first, second))
        if key not in likeness:
            likeness[key] = (metric_score(*key) + metric_score(*key[::-1])) / 2
        return likeness[key]

    return [
        sum(like(answer, other) for at, other in enumerate(answers) if at != idx) / (num_asked - 1)
        for idx, answer in enumerate(answers)
    ]


def best_of(answers: Sequence[str], scores: Sequence[float | None]) -> int:
    """Where the best answer stands: of equal scores the one that came most often, then the first."""
    counts = [answers.count(answer) for answer in answers]
    return max(range(len(answers)), key=lambda idx: (scores[idx] or 0.0, counts[idx], -idx))
