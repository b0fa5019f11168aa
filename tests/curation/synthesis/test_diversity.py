"""Figures of diversity, against what they are by definition."""

import json

import numpy as np
import pytest
from places import ROOT

from specserve.curation.synthesis.diversity import distinct, nearest_similarity, sampled, spread
from specserve.training.data.text_identity import shingles, similarity


def test_distinct_counts_runs_of_words():
    assert distinct(["a b a b", "A, B!"], 1) == 2 / 6 and distinct(["a b a b", "A, B!"], 2) == 2 / 4
    assert distinct(["a", ""], 2) == 1.0


def test_the_nearest_is_found_among_all():
    texts = [json.loads(line)["prompt"] for line in (ROOT / "examples/data/debtags.dev.jsonl").open()][:40]
    parts = [shingles(text) for text in texts]
    nearest = [max(similarity(a, b) for b in parts if b is not a) for a in parts]
    assert nearest_similarity(texts) == pytest.approx(sum(nearest) / len(nearest))
    assert nearest_similarity(["one"]) == nearest_similarity([]) == 0 and nearest_similarity(["x", "x"]) == 1


def test_spread_is_the_mean_distance_of_two():
    vectors = np.random.default_rng(0).normal(size=(7, 5)) * 3
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [1 - unit[i] @ unit[j] for i in range(7) for j in range(i)]
    assert spread(vectors) == pytest.approx(np.mean(pairs))
    assert spread(vectors[:1]) == 0 and spread(np.ones((3, 4))) == pytest.approx(0)


def test_samples_keep_their_order():
    texts = [str(idx) for idx in range(50)]
    found = sampled(texts, 10)
    assert len(found) == 10 and found == sorted(found, key=int) == sampled(texts, 10) and sampled(texts, 60) == texts
