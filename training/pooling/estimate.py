"""How long a run of embed, rerank or classify will take: some steps on this machine, scaled to its tokens."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch

from ..estimate import minutes
from ..lora_model import arithmetic
from ..trainer import Trainer
from .examples import PoolingExample
from .model import PoolingModel
from .prepare import PreparedPooling
from .run import num_outputs_of, objective_of

_NUM_STEPS = 3


def report_pooling_estimate(prepared: PreparedPooling) -> None:
    """Print the time of training and of the measurement after it."""
    click.echo("measuring a few steps ...")
    training, measuring = _seconds(prepared)
    click.echo(f"  training: {minutes(training)}")
    click.echo(f"  held-out rows: {minutes(measuring)}")
    click.echo(
        f"time: about {minutes(training + measuring)} for {len(prepared.plan)} steps over {len(prepared.examples)} rows"
    )


def _seconds(prepared: PreparedPooling) -> tuple[float, float]:
    config, plan = prepared.config, prepared.plan
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = arithmetic(config.dtype, device)
    model = PoolingModel(
        prepared.model_dir, config.lora, prepared.shape.pooling, num_outputs_of(prepared), dtype, device
    )
    sample = plan[: 1 + _NUM_STEPS]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, objective_of(prepared, model, prepared.examples, sample), sample, Path(folder), {})
        trainer.train_step()  # the first one pays for what is made once
        begin = time.perf_counter()
        timed = sample[1:] or sample
        for step in range(len(timed)):
            trainer.step = min(step + 1, len(sample) - 1)
            trainer.train_step()
        per_token = (time.perf_counter() - begin) / _num_tokens(
            [prepared.examples[i] for batch in timed for i in batch]
        )
    trained = sum(_num_tokens([prepared.examples[idx] for idx in batch]) for batch in plan)
    measured = _num_tokens(prepared.held_out)
    if prepared.task == "embed":
        measured = 2 * (measured + _num_tokens(prepared.examples[: config.eval.corpus_rows]))  # with and without LoRA
    mined = 0
    if config.embed.mined_negatives and config.optimizer.epochs is not None:
        mined = int(max(0, config.optimizer.epochs - 1)) * _num_tokens(prepared.examples)
    return per_token * (trained + mined / 3), per_token * measured / 3  # a forward alone is a third of a step


def _num_tokens(examples: Sequence[PoolingExample]) -> int:
    return sum(len(text) for example in examples for text in example.texts)
