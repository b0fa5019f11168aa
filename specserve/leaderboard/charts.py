"""The charts of the page, as SVG that follows light and dark (training/evaluation/plots.py)."""

from __future__ import annotations

from typing import Any

from ..training.evaluation.plots import SERIES, TEXT, Plot
from .standings import rating_title

_MOST = 20  # models in one chart: more cannot be read; the tables have all


def charts_of(board: dict[str, Any]) -> list[Plot]:
    """Those for which there is something to draw."""
    charts: list[Plot] = []
    for ratings in board["ratings"]:
        if len(ratings["models"]) > 1:
            charts.append(_rating_chart(ratings, len(charts)))
    points = [
        (model["name"], task, cell)
        for model in board["models"]
        for task, cell in model["cells"].items()
        if cell is not None and cell["tokens_per_s"] is not None
    ]
    if points:
        charts.append(_speed_chart(points))
    return charts


def _rating_chart(ratings: dict[str, Any], number: int) -> Plot:
    shown = ratings["models"][:_MOST][::-1]

    def draw(axes: Any) -> None:
        places = range(len(shown))
        axes.hlines(places, [one["low"] for one in shown], [one["high"] for one in shown], color=SERIES[0], linewidth=2)
        axes.scatter([one["rating"] for one in shown], places, color=SERIES[0], s=36, zorder=3)
        axes.set_yticks(places, [one["name"] for one in shown])
        axes.set(xlabel="rating; 400 more are odds of ten to one")
        axes.margins(y=0.2)
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)

    best = ratings["models"][0]
    title = rating_title(ratings)
    return Plot(f"ratings_{number}", title, f"{title}, with 95% intervals; the first is {best['name']}.", draw)


def _speed_chart(points: list[tuple[str, str, dict[str, Any]]]) -> Plot:
    def draw(axes: Any) -> None:
        axes.scatter([c["tokens_per_s"] for *_, c in points], [c["score"] for *_, c in points], color=SERIES[0], s=28)
        best: dict[str, tuple[str, str, dict[str, Any]]] = {}
        for point in sorted(points, key=lambda one: one[2]["score"]):
            best[point[1]] = point
        for model, task, cell in list(best.values())[:_MOST]:
            axes.annotate(
                f"{model}, {task}",
                (cell["tokens_per_s"], cell["score"]),
                xytext=(5, 4),
                textcoords="offset points",
                fontsize=8,
                color=TEXT,
            )
        axes.set(xlabel="tokens a second", ylabel="score")
        axes.margins(x=0.2, y=0.15)

    return Plot(
        "speed", "Score and speed", "Each point is a model at a task; the best one of each task has its name.", draw
    )
