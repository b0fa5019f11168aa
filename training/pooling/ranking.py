"""The losses of rerank, over the documents of one query: ListNet's and RankNet's.

listwise: cross-entropy between the softmax of the outputs and the scores divided by their sum (Cao et al. 2007, whose
top-one probabilities are a softmax of the scores; a share lets 0 mean "does not fit"). pairwise: the mean of
log(1 + exp(worse - better)) over the pairs of different scores (Burges et al. 2005).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .examples import RerankExample
from .objective import PoolingObjective


class RankingObjective(PoolingObjective):
    examples: Sequence[RerankExample]

    def row_losses(self, batch: Sequence[int]) -> torch.Tensor:
        rows = [self.examples[idx] for idx in batch]
        outputs = self.model.outputs([pair for e in rows for pair in e.pairs])[:, 0]
        loss = listwise_loss if self.config.rerank.loss == "listwise" else pairwise_loss
        parts = outputs.split([len(e.pairs) for e in rows])
        return torch.stack([loss(part, part.new_tensor(e.scores)) for part, e in zip(parts, rows, strict=True)])


def listwise_loss(outputs: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Of one query's documents, [D] each; scores are at least 0, and not all 0."""
    return F.cross_entropy(outputs, scores / scores.sum())


def pairwise_loss(outputs: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Of one query's documents, [D] each; at least two scores differ."""
    is_better = scores[:, None] > scores[None, :]  # [D, D]
    return F.softplus((outputs[None, :] - outputs[:, None])[is_better]).mean()
