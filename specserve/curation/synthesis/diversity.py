"""How different texts are from each other, in numbers that can be compared between seeds and what was made of them.

distinct-n: "A Diversity-Promoting Objective Function for Neural Conversation Models" (Li et al. 2016). It falls as
texts become more, so texts are compared in samples of equal size.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ...training.data.text_identity import shingles, words

MAX_TEXTS = 1000  # compared all with all


def distinct(texts: Sequence[str], n: int) -> float:
    """Different runs of `n` words among all, 0 to 1; 1 where no text has so many words."""
    runs = [tuple(found[i : i + n]) for found in map(words, texts) for i in range(len(found) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 1.0


def nearest_similarity(texts: Sequence[str]) -> float:
    """Mean of each text's similarity with its nearest other, 0 to 1: exact, over runs of characters. 0 of one text."""
    parts = [shingles(text) for text in texts]
    lens = np.array([len(part) for part in parts])
    holders: dict[int, list[int]] = defaultdict(list)
    for idx, part in enumerate(parts):
        for shingle in part:
            holders[shingle].append(idx)
    arrays = {shingle: np.array(found) for shingle, found in holders.items() if len(found) > 1}
    nearest = []
    for idx, part in enumerate(parts):
        shared = [arrays[shingle] for shingle in part if shingle in arrays]
        both = np.bincount(np.concatenate(shared), minlength=len(parts)) if shared else np.zeros(len(parts))
        values = both / (lens + lens[idx] - both)
        values[idx] = 0
        nearest.append(float(values.max()))
    return sum(nearest) / max(1, len(nearest))


def spread(vectors: npt.NDArray[np.float64]) -> float:
    """Mean cosine distance between two of the vectors [N, D], 0 to 2; 0 of one vector."""
    num = len(vectors)
    if num < 2:
        return 0.0
    unit = vectors / np.maximum(1e-12, np.linalg.norm(vectors, axis=1, keepdims=True))
    return float(1 - (np.sum(unit.sum(axis=0) ** 2) - num) / (num * (num - 1)))


def sampled(texts: Sequence[str], num: int, seed: int = 0) -> list[str]:
    """`num` of the texts, or all, in their order."""
    if len(texts) <= num:
        return list(texts)
    return [texts[idx] for idx in sorted(random.Random(seed).sample(range(len(texts)), num))]
