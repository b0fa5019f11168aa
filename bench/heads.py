"""Which lookahead head is worth its bytes? Width, vocabulary, copy window, tapped layer and loss, on one finished LoRA.

The adapter answers training prompts, its hidden states are stored once, and one head a variant is fitted to four fifths
of them. On the rest, each variant drafts alone (no other source) as the engine would: the answer is walked verification
by verification, and a draft counts up to its first wrong token. Draft milliseconds are one position for a batch of 8
sequences of 8 different adapters.

    python -m bench.heads ADAPTER_DIR --data FILE [--rows 160] [--epochs 8] [--draft-len 12] [--variant NAME ...]
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import msgspec
import torch

from specserve.drafters.head import WEIGHT_NAMES, HeadWeights, best_token, cell, initial_state, scores
from specserve.training.evaluation.answers import make_engine
from specserve.training.head_fit import anchors_of, collect_states, collect_teacher, fit_head, new_head, with_jumps
from specserve.training.head_module import Anchors, LookaheadHead, common_prefix_len, task_vocab
from specserve.training.run_config import HeadConfig

from . import common, options
from .own_answers import lora_model, own_answers
from .tasks import BaseModel

_TEXT = {"loss": "kl", "vocab_size": 4096, "train_steps_ahead": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "d=128": {"hidden_size": 128},
    "d=256": {"hidden_size": 256},
    "vocabulary 1024": {"vocab_size": 1024},
    "no copy window": {"copy_window": 0},
    "jumps": {"copy_jumps": True},
    "no jumps": {"copy_jumps": False},
    "own words": {"base_words": False},
    "no jumps, own words": {"copy_jumps": False, "base_words": False},
    "copy window 4": {"copy_window": 4},
    "4 steps ahead": {"train_steps_ahead": 4},
    "last state only": {"tapped": False},
    "KL": {"loss": "kl"},
    "LK": {"loss": "lk"},
    "free text": {**_TEXT, "copy_jumps": True},
    "free text, no jumps": {**_TEXT, "copy_jumps": False},
    "free text, no jumps, own words": {**_TEXT, "copy_jumps": False, "base_words": False},
    "free text, jumps, own words": {**_TEXT, "copy_jumps": True, "base_words": False},
}


def accepted_lengths(head: LookaheadHead, config: HeadConfig, last: torch.Tensor, tapped: torch.Tensor,
                     anchors: Anchors, lens: list[int]) -> list[int]:  # fmt: skip
    """Tokens of each verification when this head drafts alone; `lens` has the anchors of each answer, in order."""
    hits = torch.zeros(len(anchors), config.draft_len, dtype=torch.bool)
    with torch.inference_mode():
        for idx in torch.arange(len(anchors)).split(512):
            part = anchors.select(idx)
            weights = head.weights()
            state = initial_state(weights, last[part.rows][None].float(), tapped[part.rows][None].float())
            for step in range(config.draft_len):
                window = part.window[None, :, step]
                empty = torch.full((1, len(part)), len(head.vocab))
                nexts = window[..., 0].clamp(min=0) if window.shape[-1] else empty
                state = cell(weights, state, part.inputs[None, :, step], part.moved[None, :, step], nexts)
                choice, _ = best_token(*scores(weights, state, window), window)
                is_slot = choice[0] > len(head.vocab)
                right = (choice[0] == part.targets[:, step]) & (part.targets[:, step] < len(head.vocab))
                if window.shape[-1]:
                    slot = (choice[0] - len(head.vocab) - 1).clamp(min=0)
                    right |= is_slot & part.hits[:, step].gather(1, slot[:, None])[:, 0]
                hits[idx, step] = right & part.valid[:, step]
    survived = hits.long().cumprod(dim=1).sum(dim=1).tolist()
    result, start = [], 0
    for num_anchors in lens:
        position = 0
        while position < num_anchors:
            length = min(survived[start + position] + 1, num_anchors - position)
            result.append(length)
            position += length
        start += num_anchors
    return result


def draft_ms(head: LookaheadHead, hidden_size: int, repeats: int = 50) -> float:
    """Milliseconds of one position for 8 sequences of 8 heads, the fastest of `repeats`."""
    one = head.weights()
    weights = HeadWeights(**{name: getattr(one, name).detach().repeat(8, 1, 1) for name in WEIGHT_NAMES})
    state = initial_state(weights, torch.randn(8, 1, hidden_size), torch.randn(8, 1, hidden_size))
    tokens, window = torch.zeros(8, 1, dtype=torch.int64), torch.zeros(8, 1, weights.window, dtype=torch.int64)
    best = float("inf")
    with torch.inference_mode():
        for _ in range(repeats):
            start = time.perf_counter()
            state = cell(weights, state, tokens, tokens, tokens)
            best_token(*scores(weights, state, window), window)
            best = min(best, time.perf_counter() - start)
    return best * 1e3


@click.command(help=__doc__.partition("\n")[0])
@options.adapter
@options.file("--data", "Training rows.")
@options.model
@options.at_least(10, "--rows", 160)
@options.at_least(1, "--epochs", 8)
@click.option("--draft-len", type=click.IntRange(1, 32), default=12, show_default=True)
@click.option("--variant", "chosen", multiple=True, type=click.Choice(list(VARIANTS)), help="Default: all of them.")
@options.save("heads")
def main(
    adapter: Path, data: Path, model: str, rows: int, epochs: int, draft_len: int, chosen: tuple[str, ...], save: bool
) -> None:
    run = common.start("heads", "torch")
    base = BaseModel.load(model)
    click.echo(f"limit: {draft_len + 1} tokens a verification")
    engine = make_engine(base.path, batch=16, max_len=1500)
    key = engine.load_adapter(adapter.name, adapter).content_hash
    examples = own_answers(engine, key, base.examples(data, rows), 450)
    del engine
    lora = lora_model(base.path, adapter, None)
    last, tapped, starts = collect_states(lora, examples, 1024)
    cut = len(examples) * 4 // 5
    copy_start = common_prefix_len(examples)
    figures = {}
    for name in chosen or VARIANTS:
        changes = dict(VARIANTS[name])
        second = tapped if changes.pop("tapped", True) else torch.zeros_like(tapped)
        config = msgspec.structs.replace(HeadConfig(draft_len=draft_len), **changes)
        config = with_jumps(config, examples[:cut], copy_start)
        vocab = task_vocab(examples[:cut], config.vocab_size)
        torch.manual_seed(0)
        head = new_head(lora, config, vocab)
        teacher = None if config.loss == "ce" else collect_teacher(lora, head, last)
        anchors = anchors_of(head, config, examples[:cut], starts[:cut], copy_start)
        fit_head(head, config, last, second, anchors, epochs, teacher=teacher)
        walk = msgspec.structs.replace(config, train_steps_ahead=draft_len)
        held_out = anchors_of(head, walk, examples[cut:], starts[cut:], copy_start)
        lens = [len(example.completion) - 1 for example in examples[cut:]]
        lengths = accepted_lengths(head, config, last, second, held_out, lens)
        figures[name] = {
            "mean_accepted_length": round(sum(lengths) / len(lengths), 3),
            "megabytes_bf16": round(2 * sum(p.numel() for p in head.parameters()) / 1e6, 2),
            "draft_ms_8_heads": round(draft_ms(head, lora.hidden_size), 2),
        }
        click.echo(f"{name}: {figures[name]}")
    settings = {"adapter": adapter.name, "rows": len(examples), "epochs": epochs, "draft_len": draft_len}
    run.finish({**settings, "figures": figures}, save)


if __name__ == "__main__":
    main()
