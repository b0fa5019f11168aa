"""Searches of bench.pooling: who is found where, and what a re-ranker's order changes."""

import numpy as np
import pytest

from bench import pooling_quality
from bench.pooling_quality import Search


@pytest.fixture
def search(monkeypatch):
    monkeypatch.setattr(pooling_quality, "DEPTH", 2)
    return Search(["q0", "q1"], ["d0", "d1", "d2"], [[0], [2]])


def test_a_rerankers_order_counts_for_the_first_only(search, monkeypatch, tmp_path):
    scores = np.array([[0.5, 0.9, 0.1], [0.8, 0.7, 0.2]], dtype=np.float32)
    outputs = {("q0", "d1"): -3.0, ("q0", "d0"): 900.0, ("q1", "d0"): 1.0, ("q1", "d1"): 1.5}
    seen = []

    def scored(engine, pairs, params):
        seen.extend(pair for _, pair in pairs)
        return np.array([[outputs[pair]] for _, pair in pairs], dtype=np.float32)

    class Engine:
        def load_adapter(self, name, path):
            return type("Loaded", (), {"content_hash": "h"})

    class Base:
        tokenizer = None

    monkeypatch.setattr(pooling_quality, "shape_of", lambda adapter: None)
    monkeypatch.setattr(pooling_quality, "pair_ids", lambda tokenizer, shape, query, text: (query, text))
    monkeypatch.setattr(pooling_quality, "pooled_values", scored)
    found = search.reranked(Base(), Engine(), tmp_path, scores)
    assert set(seen) == set(outputs)
    assert np.argsort(-found, axis=1).tolist() == [[0, 1, 2], [1, 0, 2]]
    assert search.metrics(scores)["recall@1"] == 0.0
    assert search.metrics(found)["recall@1"] == 0.5
    assert search.metrics(found)["mrr"] == round((1 + 1 / 3) / 2, 4)
