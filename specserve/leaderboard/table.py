"""The leaderboard for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..text_tables import text_table
from .standings import GROUPS_NOTE, rating_title

MISSING = "-"


def lines_of(board: dict[str, Any]) -> Iterator[str]:
    """Scores, then speed, then ratings."""
    tasks = [task["name"] for task in board["tasks"]]
    if not board["models"] or not tasks:
        yield f"{len(tasks)} tasks, {len(board['models'])} models: `specserve leaderboard add` and `add-model` add some"
        return
    rows = [["model", "average", *(f"{task['name']} ({task['metric']})" for task in board["tasks"])]]
    for model in board["models"]:
        cells = [model["cells"][name] for name in tasks]
        scores = [MISSING if cell is None else f"{cell['score']:.3f}" for cell in cells]
        rows.append([model["name"], _number(model["average"], ".3f"), *scores])
    yield text_table(rows, num_left=1)
    if any(cell and cell["tokens_per_s"] for model in board["models"] for cell in model["cells"].values()):
        rows = [["tokens/s, tokens a verification", *tasks]]
        rows += [[model["name"], *(_speed(model["cells"][name]) for name in tasks)] for model in board["models"]]
        yield f"\n{text_table(rows, num_left=1)}"
    for ratings in board["ratings"]:
        rows = [["rank", rating_title(ratings), "", "95%"]]
        for one in ratings["models"]:
            interval = f"{one['low']:.0f} to {one['high']:.0f}"
            rows.append([str(one["rank"]), one["name"], f"{one['rating']:.0f}", interval])
        yield f"\n{text_table(rows, num_left=2)}"
        if ratings.get("num_pairs"):
            alike = ratings["judged_alike_swapped"]
            yield f"{ratings['num_pairs']} pairs; {alike:.0%} were judged alike with the answers swapped, others tie"
        if 1 < ratings["num_groups"] == ratings["group"]:
            yield GROUPS_NOTE


def _speed(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["tokens_per_s"] is None:
        return MISSING
    return f"{cell['tokens_per_s']:.0f}, {_number(cell['tokens_per_verification'], '.2f')}"


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else f"{value:{form}}"
