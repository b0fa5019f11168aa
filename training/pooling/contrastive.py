"""The loss of embed: InfoNCE over the documents of a step, and hard negatives that the model itself finds.

InfoNCE (van den Oord et al. 2018) with in-batch and given negatives, Matryoshka prefixes (Kusupati et al. 2022), and
negatives mined before each epoch, bounded by a share of the positive's score (NV-Retriever, Moreira et al. 2024). A
document that is known to fit a query is never its negative: equal texts are one document.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..objective import StepLoss
from ..run_config import RunConfig
from .examples import EmbedExample, Tokens
from .model import PoolingModel
from .objective import PoolingObjective

_MINING_ROWS = 1024  # queries whose scores over all documents are held at a time


class ContrastiveObjective(PoolingObjective):
    examples: Sequence[EmbedExample]

    def __init__(
        self,
        config: RunConfig,
        model: PoolingModel,
        examples: Sequence[EmbedExample],
        num_steps: int,
        epoch_starts: Sequence[int],
    ):
        super().__init__(config, model, examples, num_steps)
        self._epoch_starts = frozenset(epoch_starts)
        self._documents = list(dict.fromkeys(text for e in examples for text in (e.positive, *e.negatives)))
        self._fits: dict[Tokens, set[Tokens]] = {}  # query -> documents that are known to fit
        for example in examples:
            self._fits.setdefault(example.query, set()).add(example.positive)
        self._mined: list[list[int]] = []  # of each row, places in `_documents`

    def begin(self, step: int) -> None:
        if self.config.embed.mined_negatives and step and step in self._epoch_starts:
            self._mined = self._mine()

    def step_loss(
        self, batch: Sequence[int], step: int, num_targets: float, num_processes: int, rng: random.Random
    ) -> StepLoss:
        """The loss that health judges leaves the mined ones out: they get harder from epoch to epoch."""
        whole, plain = self._losses(batch, with_mined=bool(self._mined))
        values = {"loss_with_mined": whole.mean().item()} if self._mined else {}  # sync: one number a step
        return StepLoss(whole.sum() / num_targets, plain.detach().sum(), values)

    def row_losses(self, batch: Sequence[int]) -> torch.Tensor:
        return self._losses(batch, with_mined=False)[0]

    def state(self) -> dict[str, Any]:
        return {"mined": self._mined}

    def load_state(self, state: dict[str, Any]) -> None:
        self._mined = state["mined"]

    def _losses(self, batch: Sequence[int], with_mined: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses of the rows with mined negatives, if there are any, and without; [B] each."""
        rows = [self.examples[idx] for idx in batch]
        documents = list(dict.fromkeys([e.positive for e in rows] + [text for e in rows for text in e.negatives]))
        num_plain = len(documents)
        if with_mined:
            mined = (self._documents[place] for idx in batch for place in self._mined[idx])
            documents = list(dict.fromkeys([*documents, *mined]))
        queries = self.model.pooled([e.query for e in rows])  # [B, H]
        found = self.model.pooled(documents)  # [M, H]
        place = {text: idx for idx, text in enumerate(documents)}
        targets = torch.tensor([place[e.positive] for e in rows], device=queries.device)
        fits = torch.tensor([[text in self._fits[e.query] for text in documents] for e in rows], device=queries.device)
        barred = fits.scatter(1, targets[:, None], False)  # [B, M]
        others = fits[:, targets].T.clone().fill_diagonal_(False)  # [B, B]: queries that fit a row's document, too
        own = torch.arange(len(rows), device=queries.device)
        settings = self.config.embed
        sizes = (*(size for size in settings.dimensions if size < queries.shape[1]), queries.shape[1])
        losses = [torch.zeros(len(rows), device=queries.device) for _ in range(2)]
        for size in sizes:
            scores = cosines(queries[:, :size], found[:, :size]) / settings.temperature
            for which, columns in enumerate((len(documents), num_plain)):
                part = scores[:, :columns].masked_fill(barred[:, :columns], float("-inf"))
                loss = F.cross_entropy(part, targets, reduction="none")
                if settings.symmetric:
                    back = scores[:, targets].T.masked_fill(others, float("-inf"))
                    loss = (loss + F.cross_entropy(back, own, reduction="none")) / 2
                losses[which] = losses[which] + loss / len(sizes)
        return losses[0], losses[1]

    def _mine(self) -> list[list[int]]:
        """Of each row the documents nearest to its query that are not known to fit, and probably do not."""
        batch_tokens = self.config.optimizer.batch_tokens
        queries = list(dict.fromkeys(e.query for e in self.examples))
        with tqdm(total=2, desc="hard negatives", dynamic_ncols=True, leave=False) as progress:
            vectors = self.model.for_all(queries, batch_tokens, scored=False)
            progress.update()
            documents = self.model.for_all(self._documents, batch_tokens, scored=False)
            progress.update()
        by_query: dict[Tokens, list[int]] = {}
        place = {text: idx for idx, text in enumerate(self._documents)}
        for start in range(0, len(queries), _MINING_ROWS):
            part = queries[start : start + _MINING_ROWS]
            scores = cosines(vectors[start : start + _MINING_ROWS], documents)
            for query, row in zip(part, scores, strict=True):
                own = [place[text] for text in self._fits[query]]
                limit = row[own].min() * self.config.embed.mining_margin
                row[own] = float("-inf")
                row[row > limit] = float("-inf")
                best = row.topk(min(self.config.embed.mined_negatives, len(row)))
                by_query[query] = [idx for idx, score in zip(*_lists(best), strict=True) if score > float("-inf")]
        return [by_query[e.query] for e in self.examples]


def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of vectors [N, H] and [M, H] each with each, [N, M]."""
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def _lists(best: Any) -> tuple[list[int], list[float]]:
    return best.indices.tolist(), best.values.tolist()
