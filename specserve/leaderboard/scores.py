"""What answers are worth: a task's metrics over all rows, a score for each row, and an average over tasks.

The task's own metrics (training/evaluation/task_metrics.py) decide; nothing is made up for a cell that is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from ..training.evaluation.task_metrics import task_metrics
from .entries import Cell, KeptAnswer, Task, TaskRow


def cell_of(task: Task, rows: Sequence[TaskRow], answers: Mapping[str, KeptAnswer]) -> Cell:
    """Of answers to all of `rows`; speed over those that were timed, prompts included."""
    kept = [answers[row.prompt_hash] for row in rows]
    metrics = task_metrics([answer.text for answer in kept], [row.gold for row in rows])
    once = {row.prompt_hash: answers[row.prompt_hash] for row in rows}.values()  # equal prompts are answered once
    seconds = sum(answer.seconds for answer in once)
    verified, num = sum(a.num_verified for a in once), sum(a.num_verifications for a in once)
    return Cell(
        score=metrics.get(task.metric, metrics["main"]),
        row_scores=tuple(row_score(task, a.text, row.gold) for a, row in zip(kept, rows, strict=True)),
        metrics={name: value for name, value in metrics.items() if name != "main"},
        num_rows=len(rows),
        tokens_per_s=round(sum(answer.num_tokens for answer in once) / seconds, 1) if seconds else None,
        tokens_per_verification=round(verified / num, 3) if num else None,
        hardware="; ".join(sorted({answer.hardware for answer in once})),
    )


def row_score(task: Task, answer: str, gold: str) -> float:
    """By the task's metric on this row alone; by its main one where a row has none of it."""
    metrics = task_metrics([answer], [gold])
    return metrics.get(task.metric, metrics["main"])


def average(tasks: Mapping[str, Task], cells: Mapping[str, Cell]) -> float | None:
    """Mean over `tasks` of normalised scores: 0 is a task's floor, 1 the best there is. None where one is missing.

    As on the second Open LLM Leaderboard; a score below the floor counts as 0.
    """
    if not tasks or any(name not in cells for name in tasks):
        return None
    return mean(normalised(task, cells[name].score) for name, task in tasks.items())


def normalised(task: Task, score: float) -> float:
    return max(0.0, (score - task.floor) / (1.0 - task.floor))
