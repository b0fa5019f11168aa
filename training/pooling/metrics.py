"""How good rankings and classifications are: recall, MRR and nDCG; F1, accuracy and calibration error.

Everything is in [0, 1]; "main" is what runs are compared by. Of probabilities in place of answers the likelier side is
taken for true, and labels without one for absent. Ties count against the adapter: of equal scores, those
that fit stand last. Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any

import torch

from ...adapter_kinds import Question
from ...pooled_values import labels_of, probabilities
from .questions import Target

NDCG_DEPTH = 10
RECALL_DEPTHS = (1, 5, 10)
_BINS = 15


def retrieval_metrics(ranks: Sequence[Sequence[int]]) -> dict[str, float]:
    """Of searches: `ranks[i]` are the ranks, from 1, of the documents that fit search i.

    recall@k is the share of these within the first k.
    """
    scores = {
        f"recall@{depth}": mean(sum(rank <= depth for rank in found) / len(found) for found in ranks)
        for depth in RECALL_DEPTHS
    }
    scores["mrr"] = mean(1.0 / min(found) for found in ranks)
    scores[f"ndcg@{NDCG_DEPTH}"] = mean(_discounts(found) / _discounts(range(1, len(found) + 1)) for found in ranks)
    return {**scores, "main": scores["recall@10"]}


def ranks_of(scores: torch.Tensor, places: Sequence[int]) -> list[int]:
    """Ranks of the documents at `places`, by one search's scores [M]; an equal score of another stands before."""
    is_own = torch.zeros(len(scores), dtype=torch.bool)
    is_own[list(places)] = True
    others = scores[~is_own]
    own = sorted((float(scores[place]) for place in places), reverse=True)
    return [int((others >= score).sum()) + rank for rank, score in enumerate(own, 1)]


def reranking_metrics(rankings: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of lists that hold all of their documents: the gain of each document, best first."""
    scores = {
        "first_is_best": mean(float(ranking[0] == max(ranking)) for ranking in rankings),
        "mrr": mean(map(reciprocal_rank, rankings)),
        f"ndcg@{NDCG_DEPTH}": mean(map(ndcg, rankings)),
    }
    return {**scores, "main": scores["mrr"]}


def ranked(outputs: Sequence[float], gains: Sequence[float]) -> list[float]:
    """Gains in the order of falling outputs, of equal ones the lowest gain first."""
    return [gain for _, gain in sorted(zip(outputs, gains, strict=True), key=lambda pair: (-pair[0], pair[1]))]


def reciprocal_rank(ranking: Sequence[float]) -> float:
    """1 / rank of the first that fits; 0 if none does."""
    return next((1.0 / rank for rank, gain in enumerate(ranking, 1) if gain > 0), 0.0)


def ndcg(ranking: Sequence[float]) -> float:
    """Discounted gain of the first ten against the best order of all of `ranking`."""
    best = _gain(sorted(ranking, reverse=True))
    return _gain(ranking) / best if best else 0.0


def _gain(ranking: Sequence[float]) -> float:
    """Discounted, of the first ten (Järvelin and Kekäläinen 2002), gains as they are."""
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(ranking[:NDCG_DEPTH], 1))


def _discounts(ranks: Iterable[int]) -> float:
    return sum(1.0 / math.log2(rank + 1) for rank in ranks if rank <= NDCG_DEPTH)


def classification_metrics(
    questions: Sequence[Question], outputs: Sequence[Sequence[float]], targets: Sequence[Sequence[Target]]
) -> dict[str, Any]:
    """`task`: over all questions, each with equal weight but for micro F1; `questions`: each by its name, with bins."""
    by_question = {}
    counts = [0, 0, 0]  # labels that hold and were said, were said, hold
    for idx, question in enumerate(questions):
        pairs = [(row, given[idx]) for row, given in zip(outputs, targets, strict=True) if given[idx] is not None]
        if not pairs:
            continue
        by_question[question.name], found = _of_question(question, pairs)
        counts = [a + b for a, b in zip(counts, found, strict=True)]
    each = by_question.values()
    right, said, hold = counts
    task = {
        "micro_f1": 2 * right / max(1, said + hold),
        "macro_f1": mean(values["macro_f1"] for values in each),
        "accuracy": mean(values["accuracy"] for values in each),
        "calibration_error": mean(values["calibration_error"] for values in each),
    }
    return {"task": {**task, "main": task["micro_f1"]}, "questions": by_question}


def _of_question(
    question: Question, pairs: Sequence[tuple[Sequence[float], Target]]
) -> tuple[dict[str, Any], list[int]]:
    right = dict.fromkeys(question.labels, 0)
    said, hold = dict(right), dict(right)
    exact, chances_and_truth = 0, []
    for outputs, target in pairs:
        chances = probabilities(question, outputs)
        answer = set(labels_of(question, chances))
        assert target is not None
        if question.kind == "multi_label":
            assert isinstance(target, tuple)
            wanted = {label for label, holds in zip(question.labels, target, strict=True) if holds >= 0.5}
            chances_and_truth += [(chance, holds >= 0.5) for chance, holds in zip(chances, target, strict=True)]
        else:
            place = target.index(max(target)) if isinstance(target, tuple) else target
            wanted = {question.labels[place]}
            chances_and_truth.append((max(chances), answer == wanted))
        exact += answer == wanted
        for label in question.labels:
            right[label] += label in answer and label in wanted
            said[label] += label in answer
            hold[label] += label in wanted
    f1 = {name: 2 * right[name] / (said[name] + hold[name]) for name in question.labels if said[name] + hold[name]}
    totals = [sum(right.values()), sum(said.values()), sum(hold.values())]
    bins = reliability(chances_and_truth)
    return {
        "rows": len(pairs),
        "accuracy": exact / len(pairs),
        "micro_f1": 2 * totals[0] / max(1, totals[1] + totals[2]),
        "macro_f1": mean(f1.values()) if f1 else 1.0,
        "calibration_error": sum(num * abs(chance - share) for chance, share, num in bins) / len(chances_and_truth),
        "reliability": bins,
    }, totals


def reliability(chances: Sequence[tuple[float, bool]]) -> list[tuple[float, float, int]]:
    """(mean chance, share that came true, how many) of each of 15 equally wide bins that is not empty.

    The expected calibration error is the weighted mean of their differences (Naeini et al. 2015): of the likeliest
    label of multi_class, of every label of multi_label.
    """
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(_BINS)]
    for chance, came_true in chances:
        bins[min(_BINS - 1, int(chance * _BINS))].append((chance, came_true))
    return [
        (round(mean(c for c, _ in held), 4), round(sum(t for _, t in held) / len(held), 4), len(held))
        for held in bins
        if held
    ]
