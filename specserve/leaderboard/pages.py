"""The leaderboard as HTML: a page of all, and pages of answers side by side; the same files for a server and an export.

Without scripts, and with nothing from elsewhere. What came from rows and models is text, escaped by the templates.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from ..draft_sources import SOURCES
from ..training.evaluation.html_report import page_environment
from .charts import charts_of
from .entries import StoredTask
from .pairs import AnsweredRow
from .standings import GROUPS_NOTE, answered_of, rating_title, standings
from .store import LeaderboardStore

INDEX, BOARD_JSON, ANSWERS = "index.html", "board.json", ".answers-"
ROWS_PER_PAGE = 25
_TEMPLATES = Path(__file__).with_name("templates")


class Pages:
    """Of the store as it is while this is used."""

    def __init__(self, store: LeaderboardStore):
        self._store = store
        self._tasks = {task.name: task for task in store.tasks() if task.task.kind == "generate"}
        self._environment = page_environment(_TEMPLATES)
        self._environment.filters["rating_title"] = rating_title
        self._environment.filters["number"] = lambda value, digits: (
            "missing" if value is None else f"{value:.{digits}f}"
        )

    @cached_property
    def _board(self) -> dict[str, Any]:
        """Ratings take their time; pages of answers, and names that mean nothing, do without."""
        return _public(standings(self._store))

    def names(self) -> Iterator[str]:
        """Of all files."""
        yield from (INDEX, BOARD_JSON)
        for task in self._tasks.values():
            yield from (address for _, address in self._addresses(task))

    def file(self, name: str) -> bytes | None:
        """None where there is no such file."""
        if name == INDEX:
            return self._index().encode()
        if name == BOARD_JSON:
            return msgspec.json.format(msgspec.json.encode(self._board), indent=1) + b"\n"
        for task in self._tasks.values():
            for number, address in self._addresses(task):
                if address == name:
                    return self._task(task, number).encode()
        return None

    def _addresses(self, task: StoredTask) -> list[tuple[int, str]]:
        num = max(1, -(-len(self._store.rows(task)) // ROWS_PER_PAGE))
        return [(number, f"{task.name}{ANSWERS}{number}.html") for number in range(1, num + 1)]

    def _index(self) -> str:
        board = self._board
        cells = [cell for model in board["models"] for cell in model["cells"].values() if cell is not None]
        num = len(board["models"]) * len(board["tasks"])
        return self._render(
            "board.html.jinja",
            "Leaderboard",
            kind="specserve",
            what=f"{len(board['models'])} models, {len(board['tasks'])} tasks; {len(cells)} of {num} cells are there.",
            board=board,
            groups_note=GROUPS_NOTE,
            links={task.name: self._addresses(task)[0][1] for task in self._tasks.values()},
            hardware=sorted({f"Measured on {cell['hardware']}." for cell in cells}),
            plots=[{"svg": chart.svg(), "caption": chart.caption} for chart in charts_of(board)],
        )

    def _task(self, task: StoredTask, page: int) -> str:
        answered = answered_of(self._store, task)
        start = (page - 1) * ROWS_PER_PAGE
        shown = answered[start : start + ROWS_PER_PAGE]
        return self._render(
            "task.html.jinja",
            task.name,
            home=INDEX,
            first=min(start + 1, len(answered)),
            last=start + len(shown),
            num_rows=len(answered),
            metric=task.task.metric,
            page=page,
            pages=self._addresses(task),
            rows=[_row(number, one) for number, one in enumerate(shown, start + 1)],
            plots=[],
        )

    def _render(self, template: str, name: str, **values: Any) -> str:
        shared = {"name": name, "report": {"warnings": []}, "tiles": [], "shades": SOURCES}
        return self._environment.get_template(template).render(**shared, **values)


def _row(number: int, one: AnsweredRow) -> dict[str, Any]:
    answers = [
        {
            "name": name,
            "text": answer.text,
            "score": one.scores[name],
            "is_cut": answer.finish_reason == "length",
        }
        for name, answer in one.answers.items()
    ]
    return {"number": number, "prompt": one.row.prompt, "gold": one.row.gold, "answers": answers}


def _public(board: dict[str, Any]) -> dict[str, Any]:
    """Without paths of this machine: only the last part of them."""
    models = [
        {
            **{key: value for key, value in model.items() if key != "adapter"},
            "base": Path(model["base"]).name if model["base"].startswith("/") else model["base"],
            "adapter_name": Path(model["adapter"]).name if model["adapter"] is not None else None,
        }
        for model in board["models"]
    ]
    tasks = [{**task, "data": Path(task["data"]).name} for task in board["tasks"]]
    ratings = [{**one, "by": _named(one["by"])} for one in board["ratings"]]
    return {**board, "models": models, "tasks": tasks, "ratings": ratings}


def _named(judge: str) -> str:
    """A judge that runs here may be a path, and have another one behind a plus."""
    return "+".join(Path(part).name if part.startswith(("/", ".", "~")) else part for part in judge.split("+"))
