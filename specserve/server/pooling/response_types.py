"""The answers of embeddings, re-ranking, classification and scoring as OpenAI, Cohere, Jina and vLLM have them."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class PoolingUsage(msgspec.Struct, forbid_unknown_fields=True):
    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, forbid_unknown_fields=True):
    """`embedding`: numbers, or little-endian float32 in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class EmbeddingResponse(msgspec.Struct, forbid_unknown_fields=True):
    data: list[Embedding]
    model: str
    usage: PoolingUsage
    object: Literal["list"] = "list"


class AnsweredQuestion(msgspec.Struct, forbid_unknown_fields=True):
    """One question of a classification adapter: `labels` hold, `probs` has the probability of each."""

    name: str
    kind: Literal["multi_class", "multi_label"]
    labels: list[str]
    probs: dict[str, float]


class Classification(msgspec.Struct, forbid_unknown_fields=True):
    """`probs`: of all outputs, question by question; `label`: the likeliest, where that is one question's only one."""

    index: int
    label: str | None
    probs: list[float]
    num_classes: int
    questions: list[AnsweredQuestion]


class ClassifyResponse(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    created: int
    model: str
    data: list[Classification]
    usage: PoolingUsage
    object: Literal["list"] = "list"


class Score(msgspec.Struct, forbid_unknown_fields=True):
    index: int
    score: float
    object: Literal["score"] = "score"


class ScoreResponse(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage
    object: Literal["list"] = "list"


class PooledText(msgspec.Struct, forbid_unknown_fields=True):
    index: int
    data: list[float] | str
    object: Literal["pooling"] = "pooling"


class PoolingResponse(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    created: int
    model: str
    data: list[PooledText]
    usage: PoolingUsage
    object: Literal["list"] = "list"


class RankedDocument(msgspec.Struct, forbid_unknown_fields=True):
    text: str


class RankedResult(msgspec.Struct, forbid_unknown_fields=True):
    index: int  # of the document in the request
    relevance_score: float
    document: RankedDocument | UnsetType = UNSET


class CohereVersion(msgspec.Struct, forbid_unknown_fields=True):
    version: Literal["1", "2"]


class CohereTokens(msgspec.Struct, forbid_unknown_fields=True):
    input_tokens: int
    output_tokens: int = 0


class CohereMeta(msgspec.Struct, forbid_unknown_fields=True):
    api_version: CohereVersion
    tokens: CohereTokens
    warnings: list[str] | UnsetType = UNSET


class RerankResponse(msgspec.Struct, forbid_unknown_fields=True):
    """Best first. `usage` is Jina's and vLLM's, `meta` Cohere's."""

    id: str
    model: str
    results: list[RankedResult]
    usage: PoolingUsage
    meta: CohereMeta
