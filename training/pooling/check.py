"""What is in the rows of embed, rerank or classify before a run: every bad one, lengths, repeats, labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import cast

import click

from ...errors import UserError
from ...model.config import ModelConfig
from ...model.store import resolve_model
from ..data.check import histogram
from ..data.near_rows import near_report
from ..preflight import tokenizer_of
from ..run_config import RunConfig
from .examples import ClassifyExample, EmbedExample, ExampleEncoder, PoolingExample, RerankExample, Tokens
from .prepare import check_sections, overlap_warning, questions_for, settled_pooling, shape_of
from .questions import left_out
from .rows import PoolingRow, PoolingTask, all_pooling_rows

_SHOWN = 5


def report_pooling_data(config: RunConfig) -> int:
    """Print what is in both files; returns the number of problems."""
    check_sections(config)
    task = cast(PoolingTask, config.task)
    model_dir = resolve_model(config.model)
    model = ModelConfig.from_dir(model_dir)
    config = settled_pooling(config, model)
    rows, bad = all_pooling_rows(config.data.train, task, config.data.max_rows)
    held_rows: list[PoolingRow] = []
    if config.data.eval:
        held_rows, bad_too = all_pooling_rows(config.data.eval, task)
        bad += bad_too
    if not rows:
        return _say(bad)
    try:
        questions = questions_for(config, rows)
    except UserError as error:
        return _say([*bad, error])
    tokenizer = tokenizer_of(config, model_dir)
    encoder = ExampleEncoder(tokenizer, shape_of(config, questions), model.vocab_size)
    examples: list[PoolingExample] = []
    held_out: list[PoolingExample] = []
    for found, given, file in ((examples, rows, config.data.train), (held_out, held_rows, config.data.eval or "")):
        for row in given:
            try:
                found += encoder.examples([row], file, questions)
            except UserError as error:
                bad.append(error)
    num_problems = _say(bad)
    unread = Counter(name for row in rows for name in row.unread)
    if unread:
        fields = ", ".join(f"{name} ({count} rows)" for name, count in unread.most_common())
        click.echo(f"fields that are not read: {fields}")
    lens = [len(text) for e in examples for text in e.texts]
    assert config.data.max_len is not None
    click.echo(f"{len(rows)} rows, {sum(lens)} tokens in {len(lens)} texts")
    click.echo("\n".join(histogram("tokens of a text", lens)))
    num_cut = sum(length == config.data.max_len for length in lens)
    click.echo(f"texts that are cut to data.max_len ({config.data.max_len}): {num_cut}, or are just as long")
    repeats = _repeats(examples)
    shown = ", ".join(f"line {a} repeats {b}" for a, b in repeats[:_SHOWN])
    click.echo(f"rows that repeat an earlier one: {len(repeats)}" + (f" ({shown})" if repeats else ""))
    overlap = overlap_warning(examples, held_out)
    click.echo(overlap[0] if overlap else "training rows that are held-out too: 0")
    texts, held_texts = (
        {e.line: "\n".join(tokenizer.decode(text) for text in _about(e)) for e in given}
        for given in (examples, held_out)
    )
    known = {tuple(e.texts) for e in held_out}
    repeated, shared = {line for line, _ in repeats}, {e.line for e in examples if tuple(e.texts) in known}
    click.echo("\n".join(near_report(texts, held_texts, repeated, shared)))
    rare = left_out(rows, questions) if task == "classify" else {}  # type: ignore[arg-type]
    for idx, question in enumerate(questions):
        answered = sum(e.targets[idx] is not None for e in cast(list[ClassifyExample], examples))
        more = f", {rare[question.name]} rarer ones left out" if question.name in rare else ""
        click.echo(
            f"question {question.name!r} ({question.kind}): {answered} rows answer it; {len(question.labels)} labels"
            f"{more}: {', '.join(question.labels[:_SHOWN])}{', ...' if len(question.labels) > _SHOWN else ''}"
        )
    return num_problems + len(repeats) + len(overlap)


def _say(bad: Sequence[UserError]) -> int:
    for error in bad:
        click.echo(f"bad row: {error}")
    click.echo(f"bad rows: {len(bad)}")
    return len(bad)


def _about(example: PoolingExample) -> tuple[Tokens, ...]:
    """What makes two rows alike; documents that answer nothing stand in many rows."""
    if isinstance(example, EmbedExample):
        return example.query, example.positive
    if isinstance(example, RerankExample):
        return (example.pairs[example.scores.index(max(example.scores))],)
    return (example.tokens,)


def _repeats(examples: Sequence[PoolingExample]) -> list[tuple[int, int]]:
    first: dict[bytes, int] = {}
    found = []
    for example in examples:
        line = first.setdefault(example.content, example.line)
        if line != example.line:
            found.append((example.line, line))
    return found
