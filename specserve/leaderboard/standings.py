"""The leaderboard as it stands: every cell, averages, ratings; plain values that the table, the page and JSON show.

A cell that is missing is None everywhere and counts for nothing; a model without all of its cells has no average.
"""

from __future__ import annotations

from typing import Any

import msgspec

from .entries import Cell, StoredCell, StoredModel, StoredTask
from .pairs import AnsweredRow, judged_wins, metric_wins
from .ratings import Rating, ratings_of
from .scores import average
from .store import LeaderboardStore

BY_METRIC = "the tasks' metrics"

Cells = dict[tuple[str, str], StoredCell]


def standings(store: LeaderboardStore) -> dict[str, Any]:
    """`models` are in order: by average, then those that lack cells; `ratings` are by who judged and by group of models
    that have met, which alone can be compared."""
    tasks, models = store.tasks(), store.models()
    cells = {key: cell for key, cell in store.cells().items() if cell.is_current}
    lines = [_line(model, tasks, cells) for model in models]
    lines.sort(key=lambda line: (-(line["average"] if line["average"] is not None else -1.0), line["name"]))
    return {
        "tasks": [{"name": task.name, **msgspec.to_builtins(task.task)} for task in tasks],
        "models": lines,
        "ratings": _ratings(store, tasks, [model.name for model in models]),
    }


def answered_of(store: LeaderboardStore, task: StoredTask) -> list[AnsweredRow]:
    """The rows of `task` with the answers of all models whose cell is there."""
    known = {
        model: (store.answers(cell.config_hash), cell.cell.row_scores)
        for (name, model), cell in store.cells().items()
        if name == task.name and cell.is_current
    }
    return [
        AnsweredRow(
            row,
            {model: answers[row.prompt_hash] for model, (answers, _) in known.items()},
            {model: scores[idx] for model, (_, scores) in known.items()},
        )
        for idx, row in enumerate(store.rows(task))
    ]


def _line(model: StoredModel, tasks: list[StoredTask], cells: Cells) -> dict[str, Any]:
    own = {task.name: task.task for task in tasks if task.task.kind == model.model.adapter_kind}
    found = {name: cells[name, model.name].cell for name in own if (name, model.name) in cells}
    return {
        "name": model.name,
        **msgspec.to_builtins(model.model),
        "average": average(own, found),
        "num_tasks": len(own),
        "cells": {task.name: _shown(found[task.name]) if task.name in found else None for task in tasks},
    }


def _shown(cell: Cell) -> dict[str, Any]:
    return {key: value for key, value in msgspec.to_builtins(cell).items() if key != "row_scores"}


def _ratings(store: LeaderboardStore, tasks: list[StoredTask], names: list[str]) -> list[dict[str, Any]]:
    answered = [(task, answered_of(store, task)) for task in tasks if task.task.kind == "generate"]
    rows = [wins for _, one in answered for wins in metric_wins(one, names)]
    found = _rated(BY_METRIC, names, ratings_of(rows))
    for judge, identity in store.judges().items():
        verdicts = store.judgments(identity)
        judged = [judged_wins(one, names, verdicts) for _, one in answered]
        rows = [wins for wins_of_task, _, _ in judged for wins in wins_of_task if wins.any()]
        pairs = sum(num_pairs for _, num_pairs, _ in judged)
        alike = sum(num_alike for _, _, num_alike in judged)
        judged_alike = {"num_pairs": pairs, "judged_alike_swapped": alike / pairs if pairs else None}
        found += [{**one, **judged_alike} for one in _rated(judge, names, ratings_of(rows))]
    return found


def _rated(judge: str, names: list[str], ratings: list[Rating | None]) -> list[dict[str, Any]]:
    """One for each group of models, the largest first."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for name, rating in zip(names, ratings, strict=False):
        if rating is not None:
            values = {field: getattr(rating, field) for field in ("rating", "low", "high", "rank", "num_rows")}
            groups.setdefault(rating.group, []).append({"name": name, **values})
    return [
        {
            "by": judge,
            "group": number,
            "num_groups": len(groups),
            "models": sorted(models, key=lambda one: -one["rating"]),
        }
        for number, models in enumerate(sorted(groups.values(), key=len, reverse=True), 1)
    ]


def rating_title(ratings: dict[str, Any]) -> str:
    """Of one group's table."""
    title = f"Ratings by {ratings['by']}"
    return title if ratings["num_groups"] == 1 else f"{title}, group {ratings['group']} of {ratings['num_groups']}"


GROUPS_NOTE = (
    "Models of two groups have no pair in common, not even over others: their ratings say nothing of each other until "
    "pairs across are compared."
)
