"""What `bench.pooling --quality search|rerank` measures: who finds the description that belongs to a line.

All rank the same documents: the adapter and the base model by the same pooling, BM25, and all-MiniLM-L6-v2 where its
package is. A re-ranker orders the first of a list anew; the others stay behind them. Everything of ours goes through
the engine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from specserve.adapter_files import POOLING_FILE
from specserve.adapters.pooling_config import PoolingConfig, parse_pooling_config
from specserve.engine.engine import Engine
from specserve.pooling_messages import PoolingParams
from specserve.text.pooled_text import pair_ids
from specserve.training.evaluation.answers import make_engine
from specserve.training.pooling.examples import ExampleEncoder
from specserve.training.pooling.metrics import ranks_of, retrieval_metrics
from specserve.training.pooling.rows import EmbedRow, read_pooling_rows
from specserve.training.pooling.served import pooled_values

from .peers import minilm
from .tasks import BaseModel

BATCH = 32
DEPTH = 20  # of the lists that are ranked anew
MAX_LEN = 512


@dataclass(frozen=True, slots=True)
class Search:
    """Queries over documents, and the places of those that fit each."""

    queries: Sequence[str]
    documents: Sequence[str]
    fits: Sequence[Sequence[int]]

    @classmethod
    def read(cls, data: Path, num_rows: int, corpus_rows: int) -> Search:
        """Held-out rows; documents of training rows are searched, too."""
        held = _embed_rows(data / "search.dev.jsonl", num_rows)
        corpus = _embed_rows(data / "search.train.jsonl", corpus_rows) if corpus_rows else []
        documents = list(dict.fromkeys(row.positive for row in [*held, *corpus]))
        fits: dict[str, set[int]] = {}
        for row in held:
            fits.setdefault(row.query, set()).add(documents.index(row.positive))
        return cls(list(fits), documents, [sorted(places) for places in fits.values()])

    def metrics(self, scores: np.ndarray) -> dict[str, float]:
        """Of scores [queries, documents]."""
        rows = torch.from_numpy(np.ascontiguousarray(scores, dtype=np.float32))
        found = retrieval_metrics([ranks_of(row, fits) for row, fits in zip(rows, self.fits, strict=True)])
        return {name: round(value, 4) for name, value in found.items()}

    def report(self, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
        found = {name: self.metrics(values) for name, values in scores.items()}
        for name, metrics in found.items():
            click.echo(f"{name}: {metrics}")
        return {"queries": len(self.queries), "documents": len(self.documents), **found}

    def by_words(self) -> np.ndarray:
        """BM25's scores."""
        from rank_bm25 import BM25Okapi

        index = BM25Okapi([_words(text) for text in self.documents])
        return np.stack([index.get_scores(_words(query)) for query in self.queries])

    def by_vectors(self, engine: Engine, encoder: ExampleEncoder, content_hash: str | None, pooling: Any) -> np.ndarray:
        """Cosines of what the adapter makes of them; None: the base model."""
        texts = [*map(encoder.query, self.queries), *map(encoder.document, self.documents)]
        params = PoolingParams("embed", pooling=pooling, normalize=True)
        return self._cosines(pooled_values(engine, [(content_hash, text) for text in texts], params))

    def by_minilm(self) -> dict[str, np.ndarray]:
        """Nothing where its package is not installed."""
        if not minilm.is_installed():
            click.echo(f"without all-MiniLM-L6-v2: {minilm.HOW}")
            return {}
        return {"minilm": self._cosines(minilm.vectors([*self.queries, *self.documents]))}

    def reranked(self, base: BaseModel, engine: Engine, adapter: Path, scores: np.ndarray) -> np.ndarray:
        """`scores` with the first DEPTH of each query in the order of the re-ranker's."""
        shape = shape_of(adapter)
        content_hash = engine.load_adapter(adapter.name, adapter).content_hash
        first = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
        pairs = [
            (content_hash, pair_ids(base.tokenizer, shape, query, self.documents[idx]))
            for query, places in zip(self.queries, first, strict=True)
            for idx in places
        ]
        outputs = pooled_values(engine, pairs, PoolingParams("score")).reshape(first.shape)
        places = np.argsort(np.argsort(-outputs, axis=1, kind="stable"), axis=1)  # 0: the best
        moved = scores - scores.max() - 1.0  # below 0
        np.put_along_axis(moved, first, (DEPTH - places).astype(moved.dtype), axis=1)
        return moved

    def _cosines(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors of length 1, those of the queries before those of the documents."""
        return vectors[: len(self.queries)] @ vectors[len(self.queries) :].T


def measure_search(
    base: BaseModel, adapter: Path, reranker: Path | None, data: Path, num_rows: int, corpus_rows: int
) -> dict[str, Any]:
    search, shape = Search.read(data, num_rows, corpus_rows), shape_of(adapter)
    encoder = ExampleEncoder(base.tokenizer, shape)
    engine = make_engine(base.path, batch=BATCH, max_len=MAX_LEN)
    ours = engine.load_adapter(adapter.name, adapter).content_hash
    scores = {
        "adapter": search.by_vectors(engine, encoder, ours, shape.pooling),
        "base": search.by_vectors(engine, encoder, None, shape.pooling),
        "bm25": search.by_words(),
        **search.by_minilm(),
    }
    if reranker is not None:
        scores["adapter_reranked"] = search.reranked(base, engine, reranker, scores["adapter"])
    return search.report(scores)


def measure_rerank(base: BaseModel, reranker: Path, data: Path, num_rows: int, corpus_rows: int) -> dict[str, Any]:
    """BM25's lists as they are, and their first by the re-ranker and by the base model's vectors."""
    search = Search.read(data, num_rows, corpus_rows)
    engine = make_engine(base.path, batch=BATCH, max_len=MAX_LEN)
    words = search.by_words()
    vectors = search.by_vectors(engine, ExampleEncoder(base.tokenizer, PoolingConfig("embed")), None, "mean")
    first = np.argsort(-words, axis=1, kind="stable")[:, :DEPTH]
    by_base = words - words.max() - 2.0  # below any cosine
    np.put_along_axis(by_base, first, np.take_along_axis(vectors, first, axis=1), axis=1)
    scores = {"bm25": words, "reranked": search.reranked(base, engine, reranker, words), "base": by_base}
    return {"depth": DEPTH, **search.report(scores)}


def shape_of(adapter: Path) -> PoolingConfig:
    return parse_pooling_config(adapter.name, (adapter / POOLING_FILE).read_bytes())


def _embed_rows(path: Path, num: int) -> list[EmbedRow]:
    return [row for row in read_pooling_rows(path, "embed", num) if isinstance(row, EmbedRow)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
