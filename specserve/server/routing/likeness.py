"""How alike a text is to the prompts of an adapter: cosines of counted runs of characters, without a model.

Runs of 3, 4 and 5 bytes of the lower-cased text are hashed into `NUM_FEATURES` counts, whose square roots have length
1. An adapter is the direction of its prompts' sum. Its threshold comes from its own prompts: each is compared to the
others, and what lies `SPREADS` standard deviations below their mean is not one of theirs. Character n-grams as in
Cavnar and Trenkle, "N-Gram-Based Text Categorization" (1994), hashed as in Weinberger et al., "Feature Hashing for
Large Scale Multitask Learning" (2009). Deterministic: nothing is drawn, and no sum depends on threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...routing_profile import RoutingProfile, excerpt

FEATURE_BITS = 13
NUM_FEATURES = 1 << FEATURE_BITS
RUN_LENS = (3, 4, 5)
SPREADS = 3.0
LEAST_SLACK = 0.15  # of the mean, for prompts that hardly differ: requests differ more
FEW_PROMPTS = 8  # fewer say too little of how far they spread
FEW_THRESHOLD = 0.5  # for them
_FNV_PRIME = np.uint64(0x100000001B3)  # which mixes bytes into a hash
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # whose product spreads the hash over its upper bits

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Likeness:
    """What a profile's prompts have in common."""

    direction: Vector  # [NUM_FEATURES], of length 1
    threshold: float  # the least cosine that counts as one of them


def features_of(text: str) -> Vector:
    """[NUM_FEATURES] float32 of length 1; of an empty text of length 0."""
    plain = " ".join(excerpt(text).lower().split())
    data = np.frombuffer(f" {plain} ".encode("utf-8", "replace"), dtype=np.uint8).astype(np.uint64)
    if not plain:
        return np.zeros(NUM_FEATURES, dtype=np.float32)
    hashes = []
    for length in RUN_LENS:
        if (num := len(data) - length + 1) < 1:
            continue
        mixed = np.full(num, length, dtype=np.uint64)
        for offset in range(length):
            mixed = (mixed * _FNV_PRIME) ^ data[offset : offset + num]
        hashes.append((mixed * _GOLDEN) >> np.uint64(64 - FEATURE_BITS))
    counts = np.bincount(np.concatenate(hashes).astype(np.int64), minlength=NUM_FEATURES)
    return _unit(np.sqrt(counts, dtype=np.float32))


def likeness_of(profile: RoutingProfile) -> Likeness:
    return likeness_of_vectors(np.stack([features_of(prompt) for prompt in profile.prompts]))


def likeness_of_vectors(vectors: Vector, least_slack: float = LEAST_SLACK) -> Likeness:
    """Of prompts as [P, D] float32, each of length 1."""
    total = vectors.sum(0)
    if len(vectors) < FEW_PROMPTS:
        return Likeness(_unit(total), FEW_THRESHOLD)
    within = np.array([vector @ _unit(total - vector) for vector in vectors])
    mean = float(within.mean())
    return Likeness(_unit(total), mean - max(SPREADS * float(within.std()), least_slack * mean))


def cosines(text: str, directions: Sequence[Vector] | npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Of a text to each of `directions`, [A, NUM_FEATURES] -> [A]."""
    stacked = np.asarray(directions, dtype=np.float32).reshape(-1, NUM_FEATURES)
    # Not `@`: BLAS would take the engine's cores for it, and sum in an order that follows the number of adapters.
    result: npt.NDArray[np.float32] = np.einsum("ad,d->a", stacked, features_of(text))
    return result


def _unit(vector: Vector) -> Vector:
    length = float(np.sqrt(np.einsum("d,d->", vector, vector)))
    return vector / np.float32(length) if length else vector
