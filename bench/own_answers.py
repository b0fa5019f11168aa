"""What an adapter's sources are judged on: its own greedy answers, the hidden states before their tokens, and the price
that another drafted row has by the measured cost table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import torch

from specserve.adapters.lookahead import Lookahead
from specserve.drafters.head_files import LookaheadHeadFile
from specserve.drafting.cost_model import StepCurve
from specserve.engine.engine import Engine
from specserve.training.data.dataset import Example
from specserve.training.evaluation.answers import answer
from specserve.training.head_fit import collect_states
from specserve.training.lora_model import LoraModel, arithmetic
from specserve.training.run_config import LoraConfig


def lookahead_of(engine: Engine, key: str, path: Path) -> tuple[Lookahead, LookaheadHeadFile]:
    """What drafts for the loaded adapter `key`, and its head."""
    lookahead = engine.registry.adapters[key].lookahead
    if lookahead is None or lookahead.head is None:
        raise click.UsageError(f"{path} has no lookahead head that fits; give an adapter that was trained with one")
    return lookahead, lookahead.head


def own_answers(engine: Engine, key: str, asked: Sequence[Example], max_tokens: int) -> list[Example]:
    """`asked` with the adapter's answers of at least two tokens for the gold ones."""
    return answer(engine, key, [example.prompt for example in asked], max_tokens, batch=16).answered(asked)


def row_price(curve: StepCurve, expected: float, num_rows: int) -> float:
    """Tokens that another row must be expected to bring to a verification of `num_rows` that brings `expected`."""
    return expected * curve.row_seconds(num_rows, 8) / curve.seconds(num_rows)


def lora_model(base: Path, adapter: Path, tap_layer: int | None) -> LoraModel:
    """In the trainer's arithmetic: bf16 where the CPU multiplies it."""
    cpu = torch.device("cpu")
    return LoraModel(base, LoraConfig(adapter=str(adapter)), arithmetic("auto", cpu), cpu, tap_layer)


def hidden_states(
    base: Path, adapter: Path, tap_layer: int | None, examples: Sequence[Example]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Last and tapped hidden states [N, H] before each answer's tokens, and each example's first row."""
    return collect_states(lora_model(base, adapter, tap_layer), examples, 1024)
