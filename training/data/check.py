"""What is in the data before hours go into it: lengths, rows left out, (near) duplicates, leaks, rows as trained.

Reads and prints; changes nothing. Unlike a run it does not stop at the first bad row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import click
import msgspec

from ...errors import UserError
from ...model.config import ModelConfig
from ...model.store import resolve_model
from ...text.special_tokens import eos_token_ids
from ...text.tokenizer import TextTokenizer
from ..preflight import answers_itself, settled, tokenizer_of
from ..run_config import RunConfig
from .dataset import Example, RowEncoder, shared_prompts
from .near_rows import near_report, text_of
from .rows import parse_row, row_texts

_SHOWN = 5
_BAR = 40


class DataReport(msgspec.Struct, frozen=True):
    """Counts and, for what is wrong, lines of the files."""

    num_rows: int
    num_tokens: int
    num_loss_tokens: int
    prompt_lens: list[int]
    completion_lens: list[int]
    too_long: list[int]  # lines
    duplicates: list[tuple[int, int]]  # a row and the earlier one that it repeats
    overlap: list[tuple[int, int]]  # a training row and a held-out row with the same prompt

    @property
    def num_problems(self) -> int:
        return len(self.too_long) + len(self.duplicates) + len(self.overlap)


def check_data(train: Sequence[Example], held_out: Sequence[Example], max_len: int) -> DataReport:
    """Look at tokenized rows."""
    first: dict[tuple[int, ...], int] = {}
    duplicates = []
    for example in train:
        key = tuple(example.tokens)
        if key in first:
            duplicates.append((example.line, first[key]))
        first.setdefault(key, example.line)
    return DataReport(
        num_rows=len({example.line for example in train}),
        num_tokens=sum(len(example.tokens) for example in train),
        num_loss_tokens=sum(sum(example.loss_mask) for example in train),
        prompt_lens=[example.prompt_len for example in train],
        completion_lens=[len(example.completion) for example in train],
        too_long=list(dict.fromkeys(example.line for example in train if len(example.tokens) > max_len)),
        duplicates=duplicates,
        overlap=shared_prompts(train, held_out),
    )


def format_report(report: DataReport, max_len: int) -> str:
    """The report as text."""
    share = report.num_loss_tokens / max(1, report.num_tokens)
    lines = [
        f"{report.num_rows} rows, {report.num_tokens} tokens, {report.num_loss_tokens} with loss ({share:.0%})",
        *histogram("prompt tokens", report.prompt_lens),
        *histogram("completion tokens", report.completion_lens),
    ]
    for what, found in (
        (f"rows longer than data.max_len ({max_len}), left out", [f"line {line}" for line in report.too_long]),
        ("rows that repeat an earlier one", [f"line {a} repeats {b}" for a, b in report.duplicates]),
        ("training prompts that are held-out too", [f"line {a} is held-out line {b}" for a, b in report.overlap]),
    ):
        more = ", ..." if len(found) > _SHOWN else ""
        lines.append(f"{what}: {len(found)}" + (f" ({', '.join(found[:_SHOWN])}{more})" if found else ""))
    return "\n".join(lines)


def report_data(config: RunConfig) -> int:
    """Print every bad row, the report and three rows as trained; returns the number of problems."""
    model_dir = resolve_model(config.model)
    model = ModelConfig.from_dir(model_dir)
    config = settled(config, model)
    assert config.data.max_len is not None
    tokenizer = tokenizer_of(config, model_dir)
    encoder = RowEncoder(tokenizer, eos_token_ids(model_dir), config.data.system, model.vocab_size)
    unread: Counter[str] = Counter()
    texts: dict[int, str] = {}
    held_texts: dict[int, str] = {}
    is_open = answers_itself(config)
    train, bad = read_examples(config.data.train, encoder, texts, config.data.max_rows, unread, may_be_open=is_open)
    held_out: list[Example] = []
    if config.data.eval:
        may_be_open = not config.lora.enabled
        held_out, bad_too = read_examples(config.data.eval, encoder, held_texts, may_be_open=may_be_open)
        bad += bad_too
    for error in bad:
        click.echo(f"bad row: {error}")
    click.echo(f"bad rows: {len(bad)}")
    if not train:
        return len(bad)
    if unread:
        fields = ", ".join(f"{name} ({count} rows)" for name, count in unread.most_common())
        click.echo(f"fields that are not read: {fields}")
    report = check_data(train, held_out, config.data.max_len)
    click.echo(format_report(report, config.data.max_len))
    repeated, shared = ({line for line, _ in pairs} for pairs in (report.duplicates, report.overlap))
    click.echo("\n".join(near_report(texts, held_texts, repeated, shared)))
    for example in train[:3]:
        if is_open:
            click.echo(f"\nline {example.line}, which the base model will answer:\n{tokenizer.decode(example.prompt)}")
            continue
        click.echo(f"\nline {example.line}, loss only on what stands between [[ and ]]:")
        click.echo(shown_as_trained(example, tokenizer))
    return report.num_problems + len(bad)


def read_examples(
    path: str | Path,
    encoder: RowEncoder,
    texts: dict[int, str],
    max_rows: int | None = None,
    unread: Counter[str] | None = None,
    *,
    may_be_open: bool = False,
) -> tuple[list[Example], list[UserError]]:
    """The examples of all good rows and what is wrong with the others. Raises `UserError` for a file without rows.

    With `may_be_open` rows may lack their last answer, as in `read_rows`. What each good row says is kept in `texts`,
    by its line. Fields that no format has are counted in `unread`.
    """
    examples: list[Example] = []
    bad: list[UserError] = []
    num_rows = 0
    try:
        for number, text in islice(row_texts(path), max_rows):
            num_rows += 1
            try:
                row = parse_row(text, number, f"{path} line {number}", may_be_open=may_be_open)
                examples += list(encoder.examples(row))
                texts[number] = text_of(row.conversation)
                if unread is not None:
                    unread.update(row.conversation.unread)
            except UserError as error:
                bad.append(error)
    except UserError as error:  # what cannot be read as lines of text ends the file
        bad.append(error)
        return examples, bad
    if not num_rows:
        raise UserError(f"{path} holds no rows", param="data")
    return examples, bad


def shown_as_trained(example: Example, tokenizer: TextTokenizer) -> str:
    """The row's text with every part that carries loss in double brackets."""
    parts, start = [], 0
    for idx in range(1, len(example.tokens) + 1):
        if idx == len(example.tokens) or example.loss_mask[idx] != example.loss_mask[start]:
            text = tokenizer.decode(example.tokens[start:idx])
            parts.append(f"[[{text}]]" if example.loss_mask[start] else text)
            start = idx
    return "".join(parts)


def histogram(name: str, lens: Sequence[int]) -> list[str]:
    """Lines: mean and longest, then how many there are of each of some lengths."""
    width = max(1, -(-max(lens) // 8))
    counts = [0] * (max(lens) // width + 1)
    for n in lens:
        counts[n // width] += 1
    top = max(counts)
    bars = [
        f"  {idx * width:>6} - {(idx + 1) * width - 1:<6} {'#' * round(_BAR * count / top):<{_BAR}} {count}"
        for idx, count in enumerate(counts)
    ]
    return [f"{name}: mean {sum(lens) / len(lens):.0f}, longest {max(lens)}", *bars]
