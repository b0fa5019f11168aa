"""The bodies of the LoRAX routes, as msgspec types: requests with every field that is understood, and answers.

Names and shapes are LoRAX's, so that its clients and those of text-generation-inference work unchanged. What a field
means for a request is `api`'s; how output becomes an answer is `responses`'.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from ..openai.request_types import SpeculationOptions


class LoraxGrammar(msgspec.Struct, forbid_unknown_fields=True):
    """text-generation-inference's name for structured output."""

    type: Literal["json", "json_schema", "regex"]
    value: Any


class LoraxParameters(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """`parameters` of a request; null is the default everywhere."""

    adapter_id: str | None = None
    adapter_source: str | None = None
    api_token: str | None = None  # accepted, without effect: adapters are local
    max_new_tokens: int | None = None  # default: the room in the context
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    ignore_eos_token: bool | None = None
    best_of: int | None = None
    truncate: int | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    return_k_alternatives: int | None = None
    apply_chat_template: bool | None = None
    response_format: Any = None
    schema: Any = None  # the JSON Schema alone, as an object or as JSON text
    grammar: LoraxGrammar | None = None
    speculation: SpeculationOptions | None = None  # of this server
    cache_salt: str | None = None  # these three of this server
    priority: int | None = None
    deadline_ms: float | None = None
    # Known names that are refused when they ask for something.
    merged_adapters: Any = None
    typical_p: float | None = None
    watermark: bool | None = None
    top_n_tokens: int | None = None


class LoraxRequest(msgspec.Struct, forbid_unknown_fields=True):
    inputs: str
    parameters: LoraxParameters | None = None
    stream: bool | None = None  # decides at POST /; the other two routes are named for what they do


class LoraxTokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    inputs: str
    add_special_tokens: bool | None = None


class AlternativeToken(msgspec.Struct, forbid_unknown_fields=True):
    id: int
    text: str
    logprob: float


class Token(msgspec.Struct, forbid_unknown_fields=True):
    id: int
    text: str
    logprob: float
    special: bool
    skipped: bool  # came with an earlier token's forward: speculation skipped its own
    alternative_tokens: list[AlternativeToken] | UnsetType = UNSET


class PrefillToken(msgspec.Struct, forbid_unknown_fields=True):
    id: int
    text: str
    logprob: float | None  # the first token has none


FinishReason = Literal["length", "eos_token", "stop_sequence"]


class BestOfSequence(msgspec.Struct, forbid_unknown_fields=True):
    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]


class Details(msgspec.Struct, forbid_unknown_fields=True):
    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET


class LoraxResponse(msgspec.Struct, forbid_unknown_fields=True):
    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(msgspec.Struct, forbid_unknown_fields=True):
    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class LoraxStreamResponse(msgspec.Struct, forbid_unknown_fields=True):
    """One event of a stream: a token; the last one carries the whole text."""

    token: Token
    generated_text: str | None = None
    details: StreamDetails | None = None


class SimpleToken(msgspec.Struct, forbid_unknown_fields=True):
    """A token of an input and the characters start to stop that it stands for."""

    id: int
    text: str
    start: int
    stop: int


class LoraxError(msgspec.Struct, forbid_unknown_fields=True):
    error: str
    error_type: str


class LoraxInfo(msgspec.Struct, forbid_unknown_fields=True):
    """GET /info; limits that this server does not have are 0 or null."""

    model_id: str
    model_sha: str | None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    waiting_served_ratio: float
    max_batch_total_tokens: int
    max_waiting_tokens: int
    validation_workers: int
    eager_prefill: bool
    version: str
    sha: str | None
    docker_label: str | None
    request_logger_url: str | None
