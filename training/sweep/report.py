"""What a sweep came to: a table for the terminal, table.json, and report.html with plots.

Every run stands in it: those that were left behind with what they reached, those that collapsed with how.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...text_tables import figure, text_table
from ...whole_files import replace_file
from ..evaluation.html_report import tables_page
from ..evaluation.plots import SERIES, TEXT, Plot
from .grid import shown
from .halving import best_of, order_of
from .results import SweepDirectory
from .runner import Outcome

TABLE_FILE, REPORT_FILE = "table.json", "report.html"
MARKS = {
    "diverged": "the loss or the weights were no numbers any more, or far from what they were",
    "zeros": "the LoRA does nothing",
    "repeats": "answers do not end",
    "forgets": "on general text its perplexity is far above the base model's",
}
_COLUMNS = ("run", "rung", "steps", "held-out loss", "score", "tokens/s", "tokens/verification", "bytes", "general", "")


def table_of(directory: SweepDirectory, outcome: Outcome) -> dict[str, Any]:
    """All of it as plain values; runs from the best to the worst, finished ones first."""
    best = best_of(outcome.finished)
    runs = []
    for name in _ordered(outcome):
        newest = outcome.newest(name)
        assert newest is not None
        rung, result = newest
        values = {"name": name, "settings": outcome.plan.points[name], "rung": rung + 1}
        values |= msgspec.to_builtins(result)
        history = [outcome.results[name, r].loss for r in range(rung + 1)]
        runs.append({**values, "losses": history, "directory": str(directory.adapter(name))})
    return {
        "num_rungs": outcome.plan.num_rungs,
        "factor": outcome.plan.factor,
        "forgetting_limit": outcome.plan.forgetting_limit,
        "best": best,
        "serve": serve_command(directory, best) if best is not None else None,
        "runs": runs,
    }


def serve_command(directory: SweepDirectory, name: str) -> str:
    is_adapter = directory.plan().base["lora"]["enabled"]  # else a head of the bare base
    served = directory.run_folder(name) if is_adapter else directory.adapter(name)
    return f"specserve serve {'--adapters-dir' if is_adapter else '--base-head'} {shlex.quote(str(served))}"


def lines_of(table: dict[str, Any]) -> list[str]:
    """For a terminal."""
    lines = [text_table([_COLUMNS, *_rows(table)], num_left=1)]
    if table["best"] is None:
        return [*lines, "every run of the last rung collapsed; lower optimizer.lr, or give more rows"]
    best = next(run for run in table["runs"] if run["name"] == table["best"])
    lines.append(f"best: {best['name']} ({shown(best['settings'])}), score {best['score']:.3f}")
    if best["marks"]:
        lines.append(f"warning: it {' and '.join(best['marks'])}: {MARKS[best['marks'][0]]}")
    return [*lines, f"serve it with `{table['serve']}`; its directory is {best['directory']}"]


def write_report(directory: SweepDirectory, table: dict[str, Any]) -> None:
    """table.json and report.html."""
    content = msgspec.json.format(msgspec.json.encode(table), indent=1) + b"\n"
    replace_file(directory.path / TABLE_FILE, lambda path: path.write_bytes(content))
    page = _page(directory.path, table)
    replace_file(directory.path / REPORT_FILE, lambda path: path.write_text(page, encoding="utf-8"))


def _ordered(outcome: Outcome) -> list[str]:
    names: list[str] = []
    for rung in reversed(range(outcome.plan.num_rungs)):
        reached = {n: result for (n, r), result in outcome.results.items() if r == rung and n not in names}
        names += order_of(reached)
    return names


def _rows(table: dict[str, Any]) -> list[list[str]]:
    return [
        [
            run["name"],
            f"{run['rung']} of {table['num_rungs']}",
            str(run["step"]),
            figure(run["loss"], ".4f"),
            figure(run["score"], ".3f"),
            figure(run["tokens_per_s"], ".1f"),
            figure(run["tokens_per_verification"], ".2f"),
            figure(run["num_bytes"], ","),
            figure(run["general_ratio"], ".2f"),
            ", ".join([*(["best"] if run["name"] == table["best"] else []), *run["marks"]]),
        ]
        for run in table["runs"]
    ]


def _page(path: Path, table: dict[str, Any]) -> str:
    runs, best = table["runs"], table["best"]
    finished = [run for run in runs if run["score"] is not None]
    tiles = [("runs", str(len(runs))), ("trained to the end", str(len(finished)))]
    if best is not None:
        tiles += [("score of the best", f"{next(run['score'] for run in runs if run['name'] == best):.3f}")]
    keys = list(runs[0]["settings"])
    settings = [[run["name"], *(shown({key: run["settings"][key]}).partition("=")[2] for key in keys)] for run in runs]
    warnings = [f"{run['name']}: {run['problem']}" for run in runs if run["problem"]]
    marks = [[mark, text] for mark, text in MARKS.items()]
    what = (
        f"A sweep of {', '.join(keys)}: {len(runs)} runs in {table['num_rungs']} rungs; one of {table['factor']} goes "
        "on from each. Scores are the task's main metric on held-out rows, of a head alone tokens a verification; "
        "speed is of one answer at a time."
    )
    footer = f"The best is {best}; serve it with: {table['serve']}" if best is not None else "No run is worth serving."
    return tables_page(
        path.name,
        "a sweep",
        what,
        tiles,
        [_losses(table), *([_scores(finished, best)] if finished else [])],
        [
            ("Runs", [*_COLUMNS[:-1], "marks"], _rows(table)),
            ("Settings", ["run", *keys], settings),
            ("Marks", ["mark", "meaning"], marks),
        ],
        warnings=warnings,
        footer=footer,
    )


def _losses(table: dict[str, Any]) -> Plot:
    """Of every run by rung; the best stands out."""

    def draw(axes: Any) -> None:
        for run in table["runs"]:
            points = [(rung, loss) for rung, loss in enumerate(run["losses"], 1) if loss is not None]
            is_best = run["name"] == table["best"]
            colour = SERIES[1] if is_best else SERIES[0]
            label = {"label": run["name"]} if is_best else {}
            axes.plot(
                *([point[idx] for point in points] for idx in (0, 1)),
                color=colour, marker="o", markersize=4, alpha=1.0 if is_best else 0.5, zorder=3 if is_best else 2,
                **label,
            )  # fmt: skip
        axes.set(xlabel="rung", ylabel="held-out loss")
        axes.set_xticks(range(1, table["num_rungs"] + 1))
        if table["best"] is not None:
            axes.legend(frameon=False)

    caption = "Held-out loss of each run at the end of each rung that it reached; lower is better."
    return Plot("losses", "Held-out loss by rung", caption, draw)


def _scores(finished: Sequence[dict[str, Any]], best: str | None) -> Plot:
    def draw(axes: Any) -> None:
        for run in finished:
            colour = SERIES[1] if run["name"] == best else SERIES[0]
            axes.scatter([run["num_bytes"] / 1e6], [run["score"]], color=colour, s=36, zorder=3)
            axes.annotate(
                run["name"], (run["num_bytes"] / 1e6, run["score"]), xytext=(5, 4), textcoords="offset points",
                fontsize=8, color=TEXT,
            )  # fmt: skip
        axes.set(xlabel="MB", ylabel="score")
        axes.margins(x=0.25, y=0.2)

    return Plot("scores", "Score against size", "The runs that were trained to the end: score and size of files.", draw)
