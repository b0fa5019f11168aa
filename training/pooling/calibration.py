"""Probabilities that come true: a temperature for each question, and for each label from which chance it holds.

Fitted on rows that the weights have not learned from. Temperature scaling is Guo et al. 2017's, by the loss over those
rows; a threshold is the one with the best F1. Where there are too few rows to tell, 1 and 0.5 stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import torch

from ...adapter_kinds import Question
from .classes import known_chances, question_losses
from .questions import Target

_LEAST_ROWS = 20  # that answer a question, for its temperature
_LEAST_YES = 5  # rows in which a label holds, for its threshold
_LOG_RANGE = math.log(20.0)  # temperatures of 1/20 to 20
_GOLDEN = (math.sqrt(5) - 1) / 2


def calibrated(
    questions: Sequence[Question], outputs: torch.Tensor, targets: Sequence[Sequence[Target]]
) -> tuple[Question, ...]:
    """`questions` with temperatures and thresholds of held-out rows: outputs [N, all labels], targets row by row."""
    return tuple(_calibrated(q, outputs, [row[idx] for row in targets]) for idx, q in enumerate(questions))


def _calibrated(question: Question, outputs: torch.Tensor, targets: Sequence[Target]) -> Question:
    answered = [place for place, target in enumerate(targets) if target is not None]
    if len(answered) < _LEAST_ROWS:
        return question
    logits = outputs[answered][:, question.first_output : question.first_output + len(question.labels)]
    known = [targets[place] for place in answered]
    temperature = best_temperature(question, logits, known)
    thresholds: tuple[float, ...] = ()
    if question.kind == "multi_label":
        chances = torch.sigmoid(logits / temperature)
        thresholds = tuple(
            best_threshold(own[~held.isnan()], (held[~held.isnan()] >= 0.5).float())
            for own, held in zip(chances.T, known_chances(question, known).T, strict=True)
        )
    return msgspec.structs.replace(question, temperature=temperature, thresholds=thresholds)


def best_temperature(question: Question, logits: torch.Tensor, targets: Sequence[Target]) -> float:
    """The one of least loss, by golden-section search over its logarithm; the loss has one minimum."""

    def loss(log_temperature: float) -> float:
        return float(question_losses(question, logits / math.exp(log_temperature), targets).mean())

    low, high = -_LOG_RANGE, _LOG_RANGE
    for _ in range(40):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        if loss(left) < loss(right):
            high = right
        else:
            low = left
    return round(math.exp((low + high) / 2), 4)


def best_threshold(chances: torch.Tensor, holds: torch.Tensor) -> float:
    """Between two chances [N], so that those above have the best F1 against `holds` [N]."""
    num_yes = int(holds.sum())
    if num_yes < _LEAST_YES:
        return 0.5
    order = chances.argsort(descending=True)
    ordered, right = chances[order], holds[order].cumsum(0)
    f1 = 2 * right / (torch.arange(1, len(order) + 1) + num_yes)
    is_cut = torch.ones(len(order), dtype=torch.bool)
    is_cut[:-1] = ordered[:-1] > ordered[1:]  # equal chances stand on one side
    best = int(f1.masked_fill(~is_cut, -1.0).argmax())
    below = float(ordered[best + 1]) if best + 1 < len(ordered) else 0.0
    return round((float(ordered[best]) + below) / 2, 4)
