"""What `bench.pooling --quality tags` measures: labels from one pass beside those that are written as JSON.

Said and wanted labels are compared as sets, so that a label which one of the two cannot name counts against it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from specserve.adapters.pooling_config import PoolingConfig
from specserve.pooled_values import labels_of, probabilities
from specserve.pooling_messages import PoolingParams
from specserve.text.pooled_text import classified_ids
from specserve.training.evaluation.answers import answer, make_engine
from specserve.training.pooling.rows import ClassifyRow, read_pooling_rows
from specserve.training.pooling.served import pooled_values

from . import common
from .pooling_quality import BATCH, shape_of
from .tasks import BaseModel, demo_adapter

WANTED = 20.0
Labels = dict[str, set[str]]  # of each question


def measure_tags(base: BaseModel, adapter: Path, data: Path, num_rows: int, rounds: int) -> dict[str, Any]:
    """In each round both answer the next rows, the one first that was second before."""
    shape = shape_of(adapter)
    rows = read_pooling_rows(data / "tags.dev.jsonl", "classify", num_rows)
    wanted = [_wanted(row) for row in rows if isinstance(row, ClassifyRow)]
    texts = [row.text for row in rows if isinstance(row, ClassifyRow)]
    names = [question.name for question in shape.questions]
    prompts = [base.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    engine = make_engine(base.path, batch=BATCH, max_len=max(map(len, prompts)) + 512)
    classifier = engine.load_adapter("tags", adapter).content_hash
    writer = engine.load_adapter("debtags", demo_adapter("debtags")).content_hash
    said: dict[str, list[Labels]] = {"one_pass": [], "written": []}
    rates: dict[str, list[float]] = {"one_pass": [], "written": []}
    size = -(-len(texts) // rounds)
    for number, start in enumerate(range(0, len(texts), size)):
        part = slice(start, start + size)
        for name in list(said)[:: 1 if number % 2 else -1]:
            begin = time.perf_counter()
            if name == "one_pass":
                ids = [classified_ids(base.tokenizer, shape, text) for text in texts[part]]
                outputs = pooled_values(engine, [(classifier, text) for text in ids], PoolingParams("score"))
                said[name] += [_labels(shape, row.tolist()) for row in outputs]
            else:
                answers = answer(engine, writer, prompts[part], 450, batch=BATCH).answers
                said[name] += [_written(found.text, names) for found in answers]
            rates[name].append(len(texts[part]) / (time.perf_counter() - begin))
    ratios = [one / other for one, other in zip(rates["one_pass"], rates["written"], strict=True)]
    result = {
        "rows": len(texts),
        "questions": len(names),
        "labels": sum(len(question.labels) for question in shape.questions),
        "f1": {name: label_f1(found, wanted, names) for name, found in said.items()},
        "texts_per_s": {name: common.spread(values) for name, values in rates.items()},
        "ratio": common.spread(ratios),
        "wanted": WANTED,
    }
    click.echo(f"tags: F1 {result['f1']}, ratio {result['ratio']}")
    return result


def label_f1(said: Sequence[Labels], wanted: Sequence[Labels], names: Sequence[str]) -> dict[str, float]:
    """Micro F1 over all questions, and of each."""
    counts = {name: [0, 0, 0] for name in names}
    for one, other in zip(said, wanted, strict=True):
        for name in names:
            if name in other:
                found, truth = one.get(name, set()), other[name]
                for idx, num in enumerate((len(found & truth), len(found), len(truth))):
                    counts[name][idx] += num
    totals = [sum(values) for values in zip(*counts.values(), strict=True)]
    return {name: round(2 * a / max(1, b + c), 4) for name, (a, b, c) in [("all", totals), *counts.items()]}


def _labels(shape: PoolingConfig, outputs: Sequence[float]) -> Labels:
    return {q.name: set(labels_of(q, probabilities(q, outputs))) for q in shape.questions}


def _wanted(row: ClassifyRow) -> Labels:
    return {name: set(found) if isinstance(found, tuple) else {str(found)} for name, found in row.answers.items()}


def _written(text: str, names: Sequence[str]) -> Labels:
    """Of an answer that is no JSON nothing."""
    try:
        answers = json.loads(text)
    except ValueError:
        answers = {}
    found = {name: answers.get(name) for name in names} if isinstance(answers, dict) else {}
    return {
        name: {str(item) for item in value} if isinstance(value, list) else {str(value)}
        for name, value in found.items()
        if value is not None
    }
