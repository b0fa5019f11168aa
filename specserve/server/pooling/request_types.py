"""The bodies of embeddings, re-ranking, classification and scoring as OpenAI, Cohere, Jina and vLLM have them.

Every field that is understood, and no other; those of text-embeddings-inference and LoRAX are in `tei_types`. What a
field means is `texts`' and `pooler`'s.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ...adapter_kinds import PoolingType
from ...chat.types import Message

InputType = Literal["query", "search_query", "document", "passage", "search_document", "classification", "clustering"]
EncodingFormat = Literal["float", "base64"]


class ModelQuery(msgspec.Struct, forbid_unknown_fields=True):
    """The parameters of all of these routes."""

    model: str | None = None  # in place of the body's


class PoolingFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What all of them share."""

    model: str | None = None
    adapter_id: str | None = None
    cache_salt: str | None = None
    priority: int | None = None  # vLLM's: lower is sooner
    deadline_ms: float | None = None  # after so long from its arrival nobody wants the answer
    truncate_prompt_tokens: int | None = None  # vLLM's: texts are cut to so many tokens; -1: to what fits
    truncation_side: Literal["left", "right"] | None = None
    # Accepted, without effect on the answer.
    user: str | None = None
    request_id: str | None = None
    # Known names that are refused when they ask for something.
    mm_processor_kwargs: Any = None
    padding: str | None = None


class TextFields(PoolingFields, kw_only=True):
    """Of routes that take texts, or token ids, one by one; or a conversation, as vLLM has it, in their place."""

    input: str | list[Any] | None = None
    add_special_tokens: bool | None = None
    messages: list[Message] | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = None


class EmbeddingRequest(TextFields, kw_only=True):
    """Body of /v1/embeddings."""

    encoding_format: EncodingFormat | None = None
    dimensions: int | None = None
    input_type: InputType | None = None  # which of the adapter's prefixes the texts get; default document
    prompt_name: str | None = None  # the same in the words of sentence-transformers
    pooling: PoolingType | None = None  # of the base model alone
    normalize: bool | None = None
    use_activation: bool | None = None  # vLLM's name for it
    embed_dtype: str | None = None
    endianness: str | None = None


class ClassifyRequest(TextFields, kw_only=True):
    """vLLM's body of /classify."""

    use_activation: bool | None = None  # false: the outputs of the score matrix as they are


class PoolingRequest(TextFields, kw_only=True):
    """Body of /pooling: whatever the adapter makes of a text."""

    task: str | None = None
    encoding_format: EncodingFormat | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    embed_dtype: str | None = None
    endianness: str | None = None


class ScoreRequest(PoolingFields, kw_only=True):
    """Body of /score; both sides under any of their names."""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None
    items: str | list[str] | None = None
    data_1: str | list[str] | None = None
    data_2: str | list[str] | None = None
    use_activation: bool | None = None


class RerankDocument(msgspec.Struct, forbid_unknown_fields=False):
    """Cohere's first version and Jina's: other fields are the client's own, and are left alone."""

    text: str


class RerankRequest(PoolingFields, kw_only=True):
    """Body of /rerank, /v1/rerank and /v2/rerank with `documents`."""

    query: str
    documents: list[str | RerankDocument]
    top_n: int | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: int | None = None
    use_activation: bool | None = None
    truncation: bool | None = None  # Jina's; false: documents that are too long are refused instead of cut
    rank_fields: list[str] | None = None
    max_chunks_per_doc: int | None = None
    relevant_spans: Any = None


# Field -> values that ask for nothing; anything else is refused as not supported.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "chat_template": (),
    "truncation_side": ("right",),
    "mm_processor_kwargs": ({},),
    "padding": ("do_not_pad",),
    "embed_dtype": ("float32",),
    "endianness": ("native", "little"),
    "rank_fields": (["text"],),
    "max_chunks_per_doc": (1,),
    "relevant_spans": (),
}
