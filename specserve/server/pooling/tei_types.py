"""The bodies of text-embeddings-inference's routes and of LoRAX's beside them, and their answers.

The two share paths and, in part, fields. Which of both a body is, is told by its fields (`tei_api`).
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .request_types import PoolingFields


class TeiFields(PoolingFields, kw_only=True):
    """What bodies of text-embeddings-inference share; `truncate`: texts that are too long are cut, else refused."""

    truncate: bool | None = None
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None


class TeiEmbedRequest(TeiFields, kw_only=True):
    """Body of /embed; `inputs`: a text, token ids, or a list of these."""

    inputs: str | list[Any]
    normalize: bool | None = None
    dimensions: int | None = None
    prompt_name: str | None = None
    encoding_format: Literal["float"] | None = None


class TeiRerankRequest(TeiFields, kw_only=True):
    """Body of /rerank with `texts`."""

    query: str
    texts: list[str]
    raw_scores: bool = False
    return_text: bool = False


class PredictParameters(msgspec.Struct, forbid_unknown_fields=True):
    """As huggingface_hub sends them; `function_to_apply`: null is what the adapter was trained for."""

    top_k: int | None = None
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None


class TeiPredictRequest(TeiFields, kw_only=True):
    """Body of /predict; `inputs`: a text, a pair of texts, or a list of lists of one or two texts."""

    inputs: str | list[Any]
    raw_scores: bool = False
    parameters: PredictParameters | None = None  # where it is there, one text's answer is a list in a list


class SimilarityInput(msgspec.Struct, forbid_unknown_fields=True):
    source_sentence: str
    sentences: list[str]


class SimilarityParameters(msgspec.Struct, forbid_unknown_fields=True):
    truncate: bool | None = None
    truncation_direction: Literal["left", "right", "Left", "Right"] | None = None
    prompt_name: str | None = None


class SimilarityRequest(PoolingFields, kw_only=True):
    """Body of /similarity."""

    inputs: SimilarityInput
    parameters: SimilarityParameters | None = None


class LoraxPoolingParameters(msgspec.Struct, forbid_unknown_fields=True):
    adapter_id: str | None = None
    adapter_source: str | None = None
    api_token: str | None = None  # accepted, without effect: adapters are local
    merged_adapters: Any = None


class LoraxTextRequest(PoolingFields, kw_only=True):
    """LoRAX's body of /embed and /classify. Its client sends `parameters` and `stream` with every request."""

    inputs: str
    parameters: LoraxPoolingParameters | None = None
    stream: bool | None = None


class LoraxBatchRequest(PoolingFields, kw_only=True):
    """Body of /classify_batch."""

    inputs: list[str]
    parameters: LoraxPoolingParameters | None = None
    stream: bool | None = None


class LoraxEmbedding(msgspec.Struct, forbid_unknown_fields=True):
    embeddings: list[float]


class LoraxEntity(msgspec.Struct, forbid_unknown_fields=True):
    """A label that holds, with its probability; of the whole text, so `start` and `end` are its own."""

    entity_group: str
    score: float
    word: str
    start: int
    end: int


class TeiRank(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    index: int
    score: float
    text: str | None = None


class TeiPrediction(msgspec.Struct, forbid_unknown_fields=True):
    score: float
    label: str
