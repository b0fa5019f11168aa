"""What more data brings: the same run on n, 2n, 4n, ... of its rows, each measured on the same held-out ones.

A sweep over the number of rows in which every run is trained to its end; so it is interrupted and goes on as sweeps do.
Owns how many rows there are, and the table and plot of the scores by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from ...errors import UserError
from ...text_tables import figure, text_table
from ...whole_files import replace_file
from ..data.rows import row_texts
from ..evaluation.html_report import tables_page
from ..evaluation.plots import SERIES, Plot
from ..run_file import check_ready, load_run
from .report import MARKS
from .results import SweepDirectory, SweepPlan
from .runner import Outcome
from .sweep import SweepFlags, prepared_sweep

LEAST_ROWS = 4
CURVE_FILE, PAGE_FILE, PLOT_FILE = "curve.json", "curve.html", "curve.png"


def prepared_curve(
    run_file: Path | None, overrides: Sequence[str], output: Path | None, num_doublings: int
) -> tuple[SweepDirectory, SweepPlan]:
    """The sweep whose runs are the points of the curve. Raises `UserError`; writes nothing."""
    base = load_run(run_file, overrides, {})
    if output is None and not base.output:
        raise UserError("output is missing: name the directory of the curve (--output DIR)", param="output")
    check_ready(msgspec.structs.replace(base, output=base.output or "adapter"))
    num_rows = sum(1 for _ in row_texts(base.data.train))
    sizes = sizes_of(min(num_rows, base.data.max_rows or num_rows), num_doublings)
    grid = [f"data.max_rows={','.join(map(str, sizes))}"]
    flags = SweepFlags(output or Path(f"{base.output}-curve"), factor=2, rungs=1, forgetting_limit=0, general=None)
    return prepared_sweep(run_file, overrides, grid, flags)


def sizes_of(num_rows: int, num_doublings: int) -> list[int]:
    """From few to all rows, each twice the one before, but for a row. Raises `UserError` for too few of them."""
    sizes = [num_rows >> idx for idx in range(num_doublings + 1) if num_rows >> idx >= LEAST_ROWS]
    if len(sizes) < 2:
        raise UserError(
            f"data.train has {num_rows} rows; at least {2 * LEAST_ROWS} are needed to see what twice as many bring",
            param="data.train",
        )
    return sizes[::-1]


def curve_of(directory: SweepDirectory, outcome: Outcome) -> dict[str, Any]:
    """All of it as plain values, by the number of rows."""
    points = []
    for name, result in outcome.finished.items():
        values = msgspec.to_builtins(result)
        rows = outcome.plan.points[name]["data.max_rows"]
        points.append({"rows": rows, **values, "directory": str(directory.adapter(name))})
    points.sort(key=lambda point: point["rows"])
    data = outcome.plan.base["data"]
    return {"train": data["train"], "eval": data["eval"], "points": points}


def lines_of(curve: dict[str, Any]) -> list[str]:
    """For a terminal: the table, and what the last doubling brought."""
    lines = [text_table([_columns(curve), *_rows(curve)])]
    scored = [point for point in curve["points"] if point["score"] is not None]
    for before, after in list(pairwise(scored))[-1:]:
        gain = after["score"] - before["score"]
        lines.append(f"from {before['rows']} to {after['rows']} rows the score went {gain:+.3f}")
    return lines


def write_curve(directory: SweepDirectory, curve: dict[str, Any]) -> None:
    """curve.json, curve.png and curve.html."""
    content = msgspec.json.format(msgspec.json.encode(curve), indent=1) + b"\n"
    replace_file(directory.path / CURVE_FILE, lambda path: path.write_bytes(content))
    plot = _plot(curve)
    replace_file(directory.path / PLOT_FILE, plot.save)
    points = curve["points"]
    page = tables_page(
        directory.path.name,
        "a learning curve",
        f"The same run on more and more rows of {Path(curve['train']).name}, measured on {Path(curve['eval']).name}.",
        [("rows", f"{points[0]['rows']} to {points[-1]['rows']}"), ("runs", str(len(points)))],
        [plot],
        [("Runs", _columns(curve), _rows(curve))],
        warnings=[f"{point['rows']} rows: {MARKS[mark]}" for point in points for mark in point["marks"]],
    )
    replace_file(directory.path / PAGE_FILE, lambda path: path.write_text(page, encoding="utf-8"))


def _metrics(curve: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for point in curve["points"] for name in point["task"]))


def _columns(curve: dict[str, Any]) -> list[str]:
    return ["rows", "steps", "held-out loss", "score", *_metrics(curve), "marks"]


def _rows(curve: dict[str, Any]) -> list[list[str]]:
    return [
        [
            str(point["rows"]),
            str(point["step"]),
            figure(point["loss"]),
            figure(point["score"]),
            *(figure(point["task"].get(name)) for name in _metrics(curve)),
            ", ".join(point["marks"]),
        ]
        for point in curve["points"]
    ]


def _plot(curve: dict[str, Any]) -> Plot:
    scored = [(point["rows"], point["score"]) for point in curve["points"] if point["score"] is not None]

    def draw(axes: Any) -> None:
        axes.plot([rows for rows, _ in scored], [score for _, score in scored], color=SERIES[0], marker="o")
        axes.set_xscale("log", base=2)
        axes.set_xticks([rows for rows, _ in scored], [str(rows) for rows, _ in scored])
        axes.set(xlabel="training rows", ylabel="score")
        axes.minorticks_off()

    caption = "Score on the held-out rows of runs on more and more training rows, each twice as many as the one before."
    return Plot("curve", "What more rows bring", caption, draw)
