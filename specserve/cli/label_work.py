"""The work of `specserve label`: the run with bars, and its report as tables."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from ..curation.labelling.label_file import read_label_file
from ..curation.labelling.run import REPORT_SUFFIX, label
from ..teachers import Budget, TeacherSpec
from ..text_tables import figure, text_table


def label_texts(
    label_file: Path, model: str | None, teacher: TeacherSpec | None, budget: Budget, num_texts: int | None
) -> int:
    """Raises `UserError`. Exit code 1: there is no row to learn from."""
    spec = read_label_file(label_file)
    done = asyncio.run(label(spec, model=model, teacher=teacher, budget=budget, num_texts=num_texts))
    for name, question in done.report["questions"].items():
        click.echo(_table(name, question))
    for warning in done.report["warnings"]:
        click.echo(f"warning: {warning}")
    if left_out := done.report["held_out"]:
        first = left_out[0]
        click.echo(
            f"{len(left_out)} of {done.texts} texts are held out and became no rows; the first is line "
            f"{first['line']}, as {first['row']} ({first['how']})"
        )
    click.echo(f"{done.rows} rows of {done.texts} texts in {spec.output}, the report in {spec.output}{REPORT_SUFFIX}")
    return 0 if done.rows else 1


def _table(name: str, question: dict[str, Any]) -> str:
    rows = question["functions"]
    columns = ["coverage", "overlaps", "conflicts", "agreement", "accuracy"]
    shown = [["function", *columns], *([row["function"], *(figure(row[column]) for column in columns)] for row in rows)]
    lines = [f"\n{name} ({question['model']}, {question['answered']:.0%} of the texts answered)", text_table(shown, 1)]
    for model in ("dawid_skene", "mace", "majority"):
        if model in question and question[model]["rows"]:
            figures = question[model]
            lines.append(
                f"{model}: accuracy {figures['accuracy']:.3f}, micro F1 {figures['micro_f1']:.3f}, calibration error "
                f"{figures['calibration_error']:.3f} on {figures['rows']} known answers"
            )
    return "\n".join(lines)
