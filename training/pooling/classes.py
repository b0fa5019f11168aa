"""The loss of classify: cross-entropy of each question's outputs, over all questions from one forward.

multi_class questions have softmax, multi_label ones a mean of sigmoids; either may be told probabilities in place of
answers. What a row does not answer adds nothing. With class_weights "balanced", labels count by the inverse of how
often they hold: that moves probabilities away from frequencies, which temperatures cannot undo, so it is for finding
rare labels and not for calibrated chances.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...adapter_kinds import Question
from ..run_config import RunConfig
from .examples import ClassifyExample
from .model import PoolingModel
from .objective import PoolingObjective
from .questions import Target

_MOST_WEIGHT = 20.0  # a label of a few rows would be all of the loss


class ClassifyObjective(PoolingObjective):
    examples: Sequence[ClassifyExample]

    def __init__(
        self,
        config: RunConfig,
        model: PoolingModel,
        examples: Sequence[ClassifyExample],
        num_steps: int,
        questions: Sequence[Question],
    ):
        super().__init__(config, model, examples, num_steps)
        self._questions = questions
        self._weights: list[torch.Tensor | None] = [None] * len(questions)
        if config.classify.class_weights == "balanced":
            self._weights = [
                balanced_weights(question, [e.targets[idx] for e in examples]).to(model.device)
                for idx, question in enumerate(questions)
            ]

    def row_losses(self, batch: Sequence[int]) -> torch.Tensor:
        rows = [self.examples[idx] for idx in batch]
        outputs = self.model.outputs([e.tokens for e in rows])
        total = outputs.new_zeros(len(rows))
        num_answers = outputs.new_zeros(len(rows))
        for idx, question in enumerate(self._questions):
            targets = [e.targets[idx] for e in rows]
            answered = [place for place, target in enumerate(targets) if target is not None]
            if not answered:
                continue
            logits = outputs[answered][:, question.first_output : question.first_output + len(question.labels)]
            given = [targets[place] for place in answered]
            places = torch.tensor(answered, device=outputs.device)
            total = total.index_add(0, places, question_losses(question, logits, given, self._weights[idx]))
            num_answers = num_answers.index_add(0, places, torch.ones_like(logits[:, 0]))
        return total / num_answers.clamp(min=1)


def question_losses(
    question: Question, logits: torch.Tensor, targets: Sequence[Target], weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Of rows that all answer `question`, [N]; logits: [N, labels], weights: [labels]."""
    if question.kind == "multi_class" and not any(isinstance(target, tuple) for target in targets):
        wanted = torch.tensor(targets, device=logits.device)
        return F.cross_entropy(logits, wanted, weight=weights, reduction="none")
    wanted = known_chances(question, targets).to(logits.device)
    if question.kind == "multi_class":
        return F.cross_entropy(logits, wanted, weight=weights, reduction="none")
    is_known = ~wanted.isnan()
    losses = F.binary_cross_entropy_with_logits(logits, wanted.nan_to_num(), pos_weight=weights, reduction="none")
    return (losses * is_known).sum(dim=1) / is_known.sum(dim=1)


def known_chances(question: Question, targets: Sequence[Target]) -> torch.Tensor:
    """Of rows that all answer `question`: how likely each label is, [N, labels]; NaN where that is not known."""
    num = len(question.labels)
    rows = [
        target if isinstance(target, tuple) else tuple(float(idx == target) for idx in range(num)) for target in targets
    ]
    return torch.tensor(rows)


def balanced_weights(question: Question, targets: Sequence[Target]) -> torch.Tensor:
    """Of each label: those of multi_class have equal sums over the rows then, of multi_label yes and no have."""
    known = known_chances(question, [target for target in targets if target is not None])
    counts = known.nansum(dim=0)
    if question.kind == "multi_class":
        return (len(known) / (len(question.labels) * counts.clamp(min=1))).clamp(max=_MOST_WEIGHT)
    num_known = (~known.isnan()).sum(dim=0)
    return ((num_known - counts) / counts.clamp(min=1)).clamp(1 / _MOST_WEIGHT, _MOST_WEIGHT)
