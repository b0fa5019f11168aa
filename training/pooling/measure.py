"""What an adapter that pools is worth on held-out rows: its vectors and scores, by the model that trained them.

The forward is transformers' and peft's with the weights as they are saved, so figures are of the adapter and not of an
engine. Embeddings are measured beside the base model's own, without the LoRA and by the same pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...adapter_kinds import Question
from .contrastive import cosines
from .examples import ClassifyExample, EmbedExample, RerankExample, Tokens
from .metrics import classification_metrics, ranked, ranks_of, reranking_metrics, retrieval_metrics
from .model import PoolingModel


def measure_embeddings(
    model: PoolingModel,
    held_out: Sequence[EmbedExample],
    corpus: Sequence[Tokens],
    batch_tokens: int,
    sizes: Sequence[int],
) -> dict[str, Any]:
    """Each held-out query searches all held-out documents and `corpus`; `sizes` are shorter embeddings to measure."""
    queries = list(dict.fromkeys(e.query for e in held_out))
    own = [text for e in held_out for text in (e.positive, *e.negatives)]
    documents = list(dict.fromkeys([*own, *corpus]))
    place = {text: idx for idx, text in enumerate(documents)}
    fits: dict[Tokens, set[int]] = {query: set() for query in queries}
    for e in held_out:
        fits[e.query].add(place[e.positive])

    def metrics(vectors: torch.Tensor, found: torch.Tensor) -> dict[str, float]:
        scores = cosines(vectors, found)
        return retrieval_metrics([ranks_of(row, sorted(fits[q])) for q, row in zip(queries, scores, strict=True)])

    both = [model.for_all(texts, batch_tokens, scored=False) for texts in (queries, documents)]
    result: dict[str, Any] = {
        "task": metrics(*both),
        "searched_documents": len(documents),
        "by_dimensions": {str(size): metrics(*(vectors[:, :size] for vectors in both)) for size in sizes},
    }
    with model.as_base():
        both = [model.for_all(texts, batch_tokens, scored=False) for texts in (queries, documents)]
    result["base"] = metrics(*both)
    return result


def measure_reranking(model: PoolingModel, held_out: Sequence[RerankExample], batch_tokens: int) -> dict[str, Any]:
    """Each held-out query's documents in the order of their scores; `as_given` is the order of the rows."""
    outputs = model.for_all([pair for e in held_out for pair in e.pairs], batch_tokens, scored=True)[:, 0].tolist()
    rankings, start = [], 0
    for e in held_out:
        rankings.append(ranked(outputs[start : start + len(e.pairs)], e.scores))
        start += len(e.pairs)
    return {"task": reranking_metrics(rankings), "as_given": reranking_metrics([list(e.scores) for e in held_out])}


def measure_classes(
    model: PoolingModel, held_out: Sequence[ClassifyExample], questions: Sequence[Question], batch_tokens: int
) -> dict[str, Any]:
    """Labels by their thresholds, chances by their temperatures."""
    outputs = model.for_all([e.tokens for e in held_out], batch_tokens, scored=True).tolist()
    return classification_metrics(questions, outputs, [e.targets for e in held_out])
