"""`specserve label`: flags; the work is in curation/labelling, what is printed of it in label_work.py."""

from pathlib import Path
from typing import Any

import click

from .options import debug_option
from .teacher_options import TEACHER_HELP, budget_of, teacher_options, teachers_of


@click.command(epilog=TEACHER_HELP)
@click.argument("label_file", type=click.Path(path_type=Path))
@click.option("--model", help="Base model of classifiers: directory or hub id; default: specserve's default model.")
@click.option("--rows", "num_texts", type=click.IntRange(1), metavar="N", help="Only the first so many texts.")
@teacher_options(required=False)
@debug_option
def label(label_file: Path, model: str | None, num_texts: int | None, **params: Any) -> int:
    """Label texts by the functions of LABEL_FILE (YAML): patterns, Python functions, prompts and classifiers.

    Each votes on each text or abstains; a model of how often each errs turns the votes into probabilities, from which
    `specserve train` learns a classifier. Votes are kept, so that another run asks only what is new.
    """
    from .label_work import label_texts

    teachers = teachers_of(params)
    return label_texts(label_file, model, teachers[0] if teachers else None, budget_of(params), num_texts)
