"""What is in the data before hours go into it: lengths, rows left out, duplicates, leaks, and rows as they are trained.

Also the estimate of memory and time of a run. Reads and prints; changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
import torch

from ..model.config import ModelConfig
from ..model_store import resolve_model
from ..special_tokens import eos_token_ids
from ..tokenizer import TextTokenizer
from .batching import default_epochs
from .dataset import Example, read_rows, tokenize
from .evaluate import SINGLE_ROWS
from .preflight import settled
from .run_config import RunConfig

_SHOWN = 5
_BAR = 40
_DECODE_SHARE = 1 / 3  # of the matrix products' rate is what answers reach: their batches are small


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
    prompts = {tuple(example.prompt): example.line for example in held_out}
    return DataReport(
        num_rows=len({example.line for example in train}),
        num_tokens=sum(len(example.tokens) for example in train),
        num_loss_tokens=sum(sum(example.loss_mask) for example in train),
        prompt_lens=[example.prompt_len for example in train],
        completion_lens=[len(example.completion) for example in train],
        too_long=list(dict.fromkeys(example.line for example in train if len(example.tokens) > max_len)),
        duplicates=duplicates,
        overlap=[(e.line, prompts[tuple(e.prompt)]) for e in train if tuple(e.prompt) in prompts],
    )


def format_report(report: DataReport, max_len: int) -> str:
    """The report as text."""
    share = report.num_loss_tokens / max(1, report.num_tokens)
    lines = [
        f"{report.num_rows} rows, {report.num_tokens} tokens, {report.num_loss_tokens} with loss ({share:.0%})",
        *_histogram("prompt tokens", report.prompt_lens),
        *_histogram("completion tokens", report.completion_lens),
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
    """Print the report and three rows as trained; returns the number of problems."""
    tokenizer, train, held_out = _load(config)
    max_len = _max_len(config)
    report = check_data(train, held_out, max_len)
    click.echo(format_report(report, max_len))
    for example in train[:3]:
        click.echo(f"\nline {example.line}, loss only on what stands between [[ and ]]:")
        click.echo(shown_as_trained(example, tokenizer))
    return report.num_problems


def shown_as_trained(example: Example, tokenizer: TextTokenizer) -> str:
    """The row's text with every part that carries loss in double brackets."""
    parts, start = [], 0
    for idx in range(1, len(example.tokens) + 1):
        if idx == len(example.tokens) or example.loss_mask[idx] != example.loss_mask[start]:
            text = tokenizer.decode(example.tokens[start:idx])
            parts.append(f"[[{text}]]" if example.loss_mask[start] else text)
            start = idx
    return "".join(parts)


def report_estimate(config: RunConfig) -> None:
    """Print memory and time of the run, from the model's shape and a measured rate of matrix products."""
    _, train, held_out = _load(config)
    model_dir = resolve_model(config.model)
    model = ModelConfig.from_dir(model_dir)
    on_gpu = torch.cuda.is_available()
    bytes_each = 2 if config.dtype == "bf16" or (config.dtype == "auto" and on_gpu) else 4
    per_layer = model.hidden_size * (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_layer += 3 * model.hidden_size * model.intermediate_size
    linears, head = per_layer * model.num_layers, model.hidden_size * model.vocab_size
    width = 2 * model.hidden_size + 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    width += 2 * model.hidden_size + 3 * (model.hidden_size + model.intermediate_size)
    lora = config.lora.r * width * model.num_layers
    activations = config.optimizer.batch_tokens * model.num_layers * 2 * width * bytes_each
    total = (linears + head) * bytes_each + lora * 16 + activations
    max_len = _max_len(config)
    tokens = sum(len(e.tokens) for e in train if len(e.tokens) <= max_len)
    loss_tokens = sum(sum(e.loss_mask) for e in train if len(e.tokens) <= max_len)
    # Forward and the gradient of activations; the base's own weights get none.
    opt = config.optimizer
    lengths = [len(e.tokens) for e in train if len(e.tokens) <= max_len]
    epochs = opt.epochs or default_epochs(lengths, opt.batch_tokens, config.seed, opt.min_steps)
    flops = epochs * 4.0 * (linears * tokens + head * loss_tokens)
    rate = _matmul_rate(torch.device("cuda" if on_gpu else "cpu"))
    answer_len = loss_tokens / max(1, len(train))
    num_distilled = min(config.distill.rows, len(train)) if config.head.enabled else 0
    num_held_out = min(config.eval.rows, len(held_out))
    # Each prompt is answered with drafts and without, a dozen one at a time as well.
    num_answers = num_distilled + 2 * (num_held_out + min(num_held_out, SINGLE_ROWS))
    decode_flops = 2.0 * (linears + head) * num_answers * answer_len / _DECODE_SHARE
    d, steps = config.head.hidden_size, config.head.train_steps_ahead * config.distill.epochs
    fit_flops = 6.0 * num_distilled * answer_len * steps * d * (10 * d + config.head.vocab_size)
    click.echo(f"memory: about {total / 2**30:.1f} GiB ({lora / 1e6:.1f} M LoRA parameters)")
    click.echo(
        f"time: about {flops / rate / 60:.0f} minutes for {tokens * epochs:.0f} tokens at the "
        f"{rate / 1e9:.0f} GFLOP/s that this machine's matrix products reach, and about half as much again around them"
    )
    click.echo(
        f"then: about {decode_flops / rate / 60:.0f} minutes for {num_answers} answers (distill.rows "
        f"{config.distill.rows}, eval.rows {config.eval.rows}) and {fit_flops / rate / 60:.0f} to fit the head to them"
    )


def _matmul_rate(device: torch.device) -> float:
    size = 4096 if device.type == "cuda" else 768
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        x @ x
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _load(config: RunConfig) -> tuple[TextTokenizer, list[Example], list[Example]]:
    model_dir = resolve_model(config.model)
    tokenizer, eos = TextTokenizer(model_dir), eos_token_ids(model_dir)
    train = tokenize(read_rows(Path(config.data.train))[: config.data.max_rows], tokenizer, eos, config.data.system)
    held_out = []
    if config.data.eval:
        held_out = tokenize(read_rows(Path(config.data.eval)), tokenizer, eos, config.data.system)
    return tokenizer, train, held_out


def _max_len(config: RunConfig) -> int:
    max_len = settled(config, ModelConfig.from_dir(resolve_model(config.model))).data.max_len
    assert max_len is not None
    return max_len


def _histogram(name: str, lens: Sequence[int]) -> list[str]:
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
