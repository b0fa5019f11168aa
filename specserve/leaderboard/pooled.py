"""The cell of an adapter that embeds, re-ranks or classifies: measured whole, by what the trainer's report measures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ..adapter_files import POOLING_FILE
from ..adapters.pooling_config import parse_pooling_config
from .entries import Cell, Task

if TYPE_CHECKING:
    from .candidates import Candidate


def pooled_cell(model: Candidate, task: Task) -> Cell:
    """Raises `UserError`."""
    from ..text.tokenizer import TextTokenizer
    from ..training.evaluation.answers import hardware_of
    from ..training.pooling.examples import ExampleEncoder
    from ..training.pooling.measure import measure_classes, measure_embeddings, measure_reranking
    from ..training.pooling.rows import PoolingTask, read_pooling_rows
    from ..training.pooling.served import ServedTexts

    directory = model.adapter
    assert directory is not None  # a base model alone generates
    shape = parse_pooling_config(model.name, (directory / POOLING_FILE).read_bytes())
    encoder = ExampleEncoder(TextTokenizer(model.model_dir).for_adapter_in(directory), shape)
    rows = read_pooling_rows(task.data, cast(PoolingTask, task.kind), task.rows)
    held_out: list[Any] = encoder.examples(rows, task.data, shape.questions)
    served = ServedTexts(model.model_dir, directory, max(len(text) for e in held_out for text in e.texts))
    if task.kind == "embed":
        report = measure_embeddings(served, held_out, [], shape.pooling, ())
    elif task.kind == "rerank":
        report = measure_reranking(served, held_out)
    else:
        outputs = served.outputs([e.tokens for e in held_out]).tolist()
        report = measure_classes(outputs, held_out, shape.questions)
    metrics = report["task"]
    return Cell(
        score=metrics[task.metric],
        metrics={name: value for name, value in metrics.items() if name != "main"},
        num_rows=len(held_out),
        hardware=f"{hardware_of(served.engine)}, {served.engine.info.dtype}",
    )
