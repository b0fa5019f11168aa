"""What an adapter that pools is worth on held-out rows, by what the engine makes of their texts.

Embeddings are measured beside the base model's own, without the LoRA and by the same pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...adapter_kinds import PoolingType, Question
from ...pooling_messages import PoolingParams
from .contrastive import cosines
from .examples import ClassifyExample, EmbedExample, RerankExample, Tokens
from .metrics import classification_metrics, ranked, ranks_of, reranking_metrics, retrieval_metrics
from .served import ServedTexts


def measure_embeddings(
    served: ServedTexts,
    held_out: Sequence[EmbedExample],
    corpus: Sequence[Tokens],
    pooling: PoolingType,
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

    def metrics(vectors: torch.Tensor) -> dict[str, float]:
        scores = cosines(vectors[: len(queries)], vectors[len(queries) :])
        return retrieval_metrics([ranks_of(row, sorted(fits[q])) for q, row in zip(queries, scores, strict=True)])

    vectors = served.vectors([*queries, *documents])
    return {
        "task": metrics(vectors),
        "base": metrics(served.base_vectors([*queries, *documents], PoolingParams("embed", pooling=pooling))),
        "searched_documents": len(documents),
        "by_dimensions": {str(size): metrics(vectors[:, :size]) for size in sizes},
    }


def measure_reranking(served: ServedTexts, held_out: Sequence[RerankExample]) -> dict[str, Any]:
    """Each held-out query's documents in the order of their scores; `as_given` is the order of the rows."""
    outputs = served.outputs([pair for e in held_out for pair in e.pairs])[:, 0].tolist()
    rankings, start = [], 0
    for e in held_out:
        rankings.append(ranked(outputs[start : start + len(e.pairs)], e.scores))
        start += len(e.pairs)
    return {"task": reranking_metrics(rankings), "as_given": reranking_metrics([list(e.scores) for e in held_out])}


def measure_classes(
    outputs: Sequence[Sequence[float]], held_out: Sequence[ClassifyExample], questions: Sequence[Question]
) -> dict[str, Any]:
    """Labels by their thresholds, chances by their temperatures; outputs as the score matrix gives them."""
    return classification_metrics(questions, outputs, [e.targets for e in held_out])
