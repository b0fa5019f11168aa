"""Would a trained confidence output cut drafts better than the head's own probability in 12 learned levels?

The adapter answers training prompts that its head was not fitted to, and held-out prompts. Its head drafts alone from
every position of every answer; a guess counts while all before it were right, as in the engine. On the first answers
each way of confidence is fitted, on the held-out ones it is judged: log loss and Brier score, and what the engine would
make of it, a walk of verifications whose drafts are cut at the row price of the measured cost table. "known beforehand"
drafts exactly what is right: the limit of any confidence.

    python -m bench.confidence ADAPTER_DIR --data TRAIN --eval-data DEV [--skip 150] [--rows 60] [--eval-rows 40]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import nn

from specserve.drafters.head import best_token, cell, initial_state, scores
from specserve.drafters.head_files import LookaheadHeadFile
from specserve.drafters.head_source import NUM_LEVELS
from specserve.drafting.cost_model import CostModel, StepShape
from specserve.training.data.dataset import Example
from specserve.training.evaluation.answers import make_engine
from specserve.training.head_module import build_anchors

from . import common, options
from .own_answers import hidden_states, lookahead_of, own_answers, row_price
from .tasks import BaseModel

PRIOR_WEIGHT = 8.0  # of a level before anything was seen, as in drafters/acceptance.py
EPOCHS = 300
MAX_TOKENS = 300


@dataclass(frozen=True, slots=True)
class Guesses:
    """The head's guesses K steps ahead of N anchors, answer by answer."""

    states: torch.Tensor  # [N, K, d]
    probs: torch.Tensor  # [N, K]
    right: torch.Tensor  # [N, K] bool
    counted: torch.Tensor  # [N, K] bool: the answer goes on so far, and all guesses before were right
    lens: list[int]  # anchors of each answer

    def features(self, with_state: bool) -> torch.Tensor:
        """[N, K, F]: log-odds and logarithm of the probability, the position, and the state."""
        probs = self.probs.clamp(1e-4, 1 - 1e-4)
        step = torch.arange(probs.shape[1]).expand_as(probs) / probs.shape[1]
        plain = torch.stack([probs.logit(), probs.log(), step], dim=-1)
        return torch.cat([plain, self.states], dim=-1) if with_state else plain


@torch.inference_mode()
def guesses_of(head: LookaheadHeadFile, last: torch.Tensor, tapped: torch.Tensor, starts: Sequence[int],
               examples: Sequence[Example]) -> Guesses:  # fmt: skip
    config, weights = head.config, head.weights
    num_vocab, other = len(config.vocab), weights.embed.shape[1] - 1  # padding stands between the two
    window, jumps = config.copy_window, config.copy_jumps
    anchors = build_anchors(examples, starts, config.vocab, config.draft_len, config.copy_start, window, jumps)

    def place(ids: torch.Tensor) -> torch.Tensor:
        return torch.where(ids == num_vocab, other, ids)

    states, probs, right = [], [], []
    state = initial_state(weights, last[anchors.rows][None].float(), tapped[anchors.rows][None].float())
    for step in range(config.draft_len):
        window = place(anchors.window[None, :, step])  # [1, N, W]
        nexts = window[..., 0].clamp(min=0) if config.copy_window else torch.full_like(window[..., 0], other)
        state = cell(weights, state, place(anchors.inputs[None, :, step]), anchors.moved[None, :, step], nexts)
        choice, prob = best_token(*scores(weights, state, window), window)
        is_right = (choice[0] == anchors.targets[:, step]) & (anchors.targets[:, step] < num_vocab)
        if config.copy_window:
            slot = (choice[0] - other - 1).clamp(min=0)
            is_right |= (choice[0] > other) & anchors.hits[:, step].gather(1, slot[:, None])[:, 0]
        states.append(state[0].float())
        probs.append(prob[0].float())
        right.append(is_right & anchors.valid[:, step])
    hits = torch.stack(right, dim=1)
    before = torch.cat([torch.ones(len(anchors), 1, dtype=torch.bool), hits[:, :-1]], dim=1).long().cumprod(1).bool()
    lens = [len(example.completion) - 1 for example in examples]
    return Guesses(torch.stack(states, 1), torch.stack(probs, 1), hits, before & anchors.valid, lens)


def level_of(probs: torch.Tensor) -> torch.Tensor:
    """The engine's levels: equal steps of probability."""
    return (probs * NUM_LEVELS).long().clamp(max=NUM_LEVELS - 1)


def odds_level_of(probs: torch.Tensor) -> torch.Tensor:
    """As many levels in equal steps of log-odds, from 1 in 20 to 999 in 1,000: finer where most guesses are."""
    return ((probs.clamp(1e-6, 1 - 1e-6).logit() + 3) / 10 * NUM_LEVELS).long().clamp(0, NUM_LEVELS - 1)


def fit_levels(fitted: Guesses, judged: Guesses, level: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """[N, K] of `judged`: the hit rate of the probability's level, as the engine learns it; the prior is the mean
    probability of the level."""
    levels, right = level(fitted.probs)[fitted.counted], fitted.right[fitted.counted].float()
    seen = torch.bincount(levels, minlength=NUM_LEVELS)
    hits = torch.bincount(levels, weights=right, minlength=NUM_LEVELS)
    mass = torch.bincount(levels, weights=fitted.probs[fitted.counted], minlength=NUM_LEVELS)
    prior = mass / seen.clamp(min=1)
    return ((hits + prior * PRIOR_WEIGHT) / (seen + PRIOR_WEIGHT))[level(judged.probs)]


def fit_network(fitted: Guesses, judged: Guesses, with_state: bool, hidden: int) -> torch.Tensor:
    """[N, K] of `judged` from a logistic regression (`hidden` 0) or one hidden layer, stopped at its best epoch on
    the last fifth of the fitted answers."""
    torch.manual_seed(0)
    x, y = fitted.features(with_state)[fitted.counted], fitted.right[fitted.counted].float()
    mean, std = x.mean(0), x.std(0).clamp(min=1e-3)
    anchor_cut = sum(fitted.lens[: len(fitted.lens) * 4 // 5])
    cut = int(fitted.counted[:anchor_cut].sum())
    x = (x - mean) / std
    layers = [nn.Linear(x.shape[1], hidden), nn.Tanh(), nn.Linear(hidden, 1)] if hidden else [nn.Linear(x.shape[1], 1)]
    network = nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    best, best_loss = {name: value.clone() for name, value in network.state_dict().items()}, float("inf")
    for _ in range(EPOCHS):
        for idx in torch.randperm(cut).split(1024):
            loss = F.binary_cross_entropy_with_logits(network(x[idx])[:, 0], y[idx])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            held = float(F.binary_cross_entropy_with_logits(network(x[cut:])[:, 0], y[cut:]))
        if held < best_loss:
            best, best_loss = {name: value.clone() for name, value in network.state_dict().items()}, held
    network.load_state_dict(best)
    with torch.no_grad():
        return torch.sigmoid(network((judged.features(with_state) - mean) / std)[..., 0])


def walk(guesses: Guesses, confidence: torch.Tensor | None, cost: CostModel, batch: int) -> dict[str, float]:
    """Verifications over all answers, each of `batch` equal sequences; None: only right guesses are drafted."""
    curve = cost.curve(StepShape())
    tokens, verifications, seconds, first = 0, 0, 0.0, 0
    right = guesses.right.tolist()
    chances = (guesses.right.float() if confidence is None else confidence).tolist()
    for num_anchors in guesses.lens:
        position = 0
        while position < num_anchors:
            survival, expected, rows, accepted, holds = 1.0, 1.0, 1, 0, True
            for chance, is_right in zip(chances[first + position], right[first + position], strict=True):
                survival *= chance
                if survival < row_price(curve, batch * expected, batch * rows) or survival == 0.0:
                    break
                rows, expected = rows + 1, expected + survival
                holds = holds and is_right
                accepted += holds
            gained = min(accepted + 1, num_anchors - position)
            tokens, verifications, seconds = tokens + gained, verifications + 1, seconds + curve.seconds(batch * rows)
            position += gained
        first += num_anchors
    return {
        f"tokens_a_verification_batch_{batch}": round(tokens / verifications, 3),
        f"tokens_per_model_second_batch_{batch}": round(batch * tokens / seconds, 2),
    }


@click.command(help=__doc__.partition("\n")[0])
@options.adapter
@options.file("--data", "Training rows.")
@options.file("--eval-data", "Held-out rows.")
@options.model
@options.at_least(0, "--skip", 150, "Rows the head was fitted to.")
@options.at_least(5, "--rows", 60)
@options.at_least(1, "--eval-rows", 40)
@options.save("confidence")
def main(
    adapter: Path, data: Path, eval_data: Path, model: str, skip: int, rows: int, eval_rows: int, save: bool
) -> None:
    run = common.start("confidence", "torch")
    base = BaseModel.load(model)
    engine = make_engine(base.path, batch=16, max_len=1500)
    key = engine.load_adapter(adapter.name, adapter).content_hash
    _, head = lookahead_of(engine, key, adapter)
    click.echo(f"limit: {head.config.draft_len + 1} tokens a verification; of this head the line 'known beforehand'")
    cost = engine.proposer.cost_model
    sets = []
    for asked in (base.examples(data, rows, skip=skip), base.examples(eval_data, eval_rows)):
        answers = own_answers(engine, key, asked, MAX_TOKENS)
        # one that runs in circles would outweigh all others
        sets.append([example for example in answers if len(example.completion) < MAX_TOKENS])
    del engine
    fitted, judged = (
        guesses_of(head, *hidden_states(base.path, adapter, head.config.tap_layer, examples), examples)
        for examples in sets
    )
    confidences = {
        "own probability": judged.probs,
        "12 learned levels": fit_levels(fitted, judged, level_of),
        "12 learned levels of log-odds": fit_levels(fitted, judged, odds_level_of),
        "logistic on probability and position": fit_network(fitted, judged, with_state=False, hidden=0),
        "logistic with the state": fit_network(fitted, judged, with_state=True, hidden=0),
        "one hidden layer of 32 with the state": fit_network(fitted, judged, with_state=True, hidden=32),
        "known beforehand": None,
    }
    figures: dict[str, Any] = {}
    truth = judged.right[judged.counted].float()
    for name, confidence in confidences.items():
        figures[name] = {}
        if confidence is not None:
            chance = confidence[judged.counted].clamp(1e-4, 1 - 1e-4)
            figures[name]["log_loss"] = round(float(F.binary_cross_entropy(chance, truth)), 4)
            figures[name]["brier"] = round(float(((chance - truth) ** 2).mean()), 4)
        figures[name] |= walk(judged, confidence, cost, 1) | walk(judged, confidence, cost, 8)
        click.echo(f"{name}: {figures[name]}")
    settings = {
        "adapter": adapter.name,
        "answers": [len(examples) for examples in sets],
        "guesses": [int(fitted.counted.sum()), int(judged.counted.sum())],
        "hit_rate": round(float(truth.mean()), 4),
        "step_ms": {rows: round(1e3 * cost.seconds(rows), 2) for rows in (1, 4, 8, 16, 32, 64)},
    }
    run.finish({**settings, "figures": figures}, save)


if __name__ == "__main__":
    main()
