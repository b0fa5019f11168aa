"""report.json, model card, plots and report.html of an adapter that pools; `specserve eval DIR` makes them again."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ...adapter_files import POOLING_FILE, WEIGHTS_FILE
from ...adapter_kinds import Question
from ...adapters.pooling_config import PoolingConfig, parse_pooling_config
from ...errors import UserError
from ...model.store import resolve_model
from ...text.tokenizer import TextTokenizer
from ..evaluation.verdict import steps_warning
from ..metrics_file import METRICS_FILE, read_metrics
from ..run_config import RunConfig
from ..run_file import RUN_FILE, load_run
from .examples import ClassifyExample, EmbedExample, ExampleEncoder, PoolingExample, RerankExample, Tokens
from .measure import measure_classes, measure_embeddings, measure_reranking
from .report import write_pooling_report
from .rows import PoolingTask, read_pooling_rows
from .served import ServedTexts


def evaluate_pooling_directory(directory: Path, data: Path | None, rows: int | None) -> dict[str, Any]:
    """Measure the adapter in `directory` on `data` (default: its run's held-out rows); returns the report."""
    run_file = directory / RUN_FILE
    config = load_run(run_file, [], {}) if run_file.is_file() else RunConfig()
    data = data or (Path(config.data.eval) if config.data.eval else None)
    if data is None:
        raise UserError(f"{directory} names no held-out rows (data.eval in {RUN_FILE}); give --data FILE", param="data")
    shape = parse_pooling_config(directory.name, (directory / POOLING_FILE).read_bytes())
    if shape.adapter_type == "generate":
        raise UserError(f"{directory / POOLING_FILE} says that it generates; remove that file", param="adapter")
    task = cast(PoolingTask, shape.adapter_type)
    model_dir = resolve_model(config.model)
    encoder = ExampleEncoder(TextTokenizer(model_dir).for_adapter_in(directory), shape)
    held_out = encoder.examples(read_pooling_rows(data, task, rows), str(data), shape.questions)
    corpus: list[Tokens] = []
    if task == "embed" and config.eval.corpus_rows and Path(config.data.train).is_file():
        train = read_pooling_rows(config.data.train, task, config.eval.corpus_rows)
        corpus = [e.positive for e in encoder.examples(train, config.data.train)]
    return evaluate_pooling(directory, model_dir, shape, config, held_out, corpus, None, str(data))


def evaluate_pooling(
    directory: Path,
    model_dir: Path,
    shape: PoolingConfig,
    config: RunConfig,
    held_out: Sequence[PoolingExample],
    corpus: Sequence[Tokens],
    uncalibrated: Sequence[Question] | None,
    data: str,
) -> dict[str, Any]:
    """Measure the adapter in `directory` and write what is to be said of it; returns the report."""
    longest = max(len(text) for texts in ([text for e in held_out for text in e.texts], corpus) for text in texts)
    served = ServedTexts(model_dir, directory, longest)
    report: dict[str, Any] = {
        "adapter_type": shape.adapter_type,
        "rows": len(held_out),
        "data": data,
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} thread(s), {served.engine.info.device}",
        "dtype": served.engine.info.dtype,
        "pooling": shape.pooling,
        "weights_bytes": (directory / WEIGHTS_FILE).stat().st_size,
    }
    if shape.adapter_type == "embed":
        rows = cast(Sequence[EmbedExample], held_out)
        report |= measure_embeddings(served, rows, corpus, shape.pooling, shape.dimensions)
    elif shape.adapter_type == "rerank":
        report |= {"num_outputs": 1, **measure_reranking(served, cast(Sequence[RerankExample], held_out))}
    else:
        classified = cast(Sequence[ClassifyExample], held_out)
        outputs = served.outputs([e.tokens for e in classified]).tolist()
        report |= measure_classes(outputs, classified, shape.questions)
        if uncalibrated is not None and list(uncalibrated) != list(shape.questions):
            report["uncalibrated"] = measure_classes(outputs, classified, uncalibrated)["task"]
        report["num_outputs"] = sum(len(question.labels) for question in shape.questions)
        report["open_answers"] = sum(target is None for e in classified for target in e.targets)
    report["steps"] = max((values["step"] for values in read_metrics(directory / METRICS_FILE)), default=None)
    report["warnings"] = [*steps_warning(report["steps"], config.optimizer.min_steps), *pooling_warnings(report)]
    write_pooling_report(directory, report)
    return report


def pooling_warnings(report: dict[str, Any]) -> list[str]:
    """What speaks against the adapter."""
    found, main = [], report["task"]["main"]
    for name, what in (("base", "the base model without it"), ("as_given", "the order of the rows as they are given")):
        if name in report and main <= report[name]["main"]:
            found.append(f"it is no better than {what} ({main:.3f} against {report[name]['main']:.3f})")
    for name, values in report.get("questions", {}).items():
        if values["micro_f1"] == 0.0:
            found.append(f"question {name!r}: no label is ever right")
    if found:
        found.append("train on more rows or for more steps (optimizer.epochs), and look at --check-data")
    return found
