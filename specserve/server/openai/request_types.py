"""The request bodies of the HTTP API, as msgspec types: every field that is understood, and no other.

A field that is not here is refused by name. Fields that would change the output but are not served yet are here so that
their refusal can say so (`UNSUPPORTED`); those that change nothing are accepted and ignored.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from ...chat.types import Message, TextPart


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # accepted, ignored


class Prediction(msgspec.Struct, forbid_unknown_fields=True):
    """OpenAI's Predicted Outputs: the text that the client expects."""

    type: Literal["content"]
    content: str | list[TextPart]


class SpeculationOptions(msgspec.Struct, forbid_unknown_fields=True):
    mode: Literal["auto", "off", "ngram", "fixed"] = "auto"
    max_draft_tokens: int | None = None
    trace: bool = False  # answers say where each token came from


class CommonFields(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What every route that generates shares, /v1/responses too."""

    model: str | None = None
    adapter_id: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    seed: int | None = None
    stream: bool | None = None
    prediction: Prediction | None = None
    speculation: SpeculationOptions | None = None
    return_speculation_stats: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None  # vLLM's: lower is sooner
    deadline_ms: float | None = None  # after so long from its arrival nobody wants the answer
    structured_outputs: Any = None


class GenerationFields(CommonFields, kw_only=True):
    """What /v1/chat/completions and /v1/completions share."""

    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    stream_options: StreamOptions | None = None
    response_format: Any = None  # with `structured_outputs` and these four: `grammar.structured_output`
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    # Accepted, without effect on the output.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    request_id: str | None = None  # vLLM's: the answer has an id of its own
    guided_decoding_backend: str | None = None
    # Known names that are refused when they ask for something.
    logits_processors: Any = None
    use_beam_search: bool | None = None
    lora_request: Any = None
    mm_processor_kwargs: Any = None
    media_io_kwargs: Any = None
    truncate_prompt_tokens: Any = None
    prompt_logprobs: Any = None
    length_penalty: float | None = None
    early_stopping: Any = None
    spaces_between_special_tokens: bool | None = None
    detokenize: bool | None = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    guided_whitespace_pattern: Any = None
    structural_tag: Any = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    kv_transfer_params: Any = None
    vllm_xargs: Any = None


class CompletionRequest(GenerationFields, kw_only=True):
    """Body of /v1/completions."""

    prompt: str | list[Any]
    add_special_tokens: bool | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None


class ChatRequest(GenerationFields, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    add_special_tokens: bool | None = None  # the template writes them
    echo: bool | None = None
    continue_final_message: bool | None = None
    parallel_tool_calls: bool | None = None  # without tools it has no effect
    tools: list[Any] | None = None  # these two: `chat.tools.definitions`
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: Any = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None
    documents: Any = None


class LoadAdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    lora_name: str
    lora_path: str
    load_inplace: bool = False  # vLLM's flag: give the name to this directory though another one has it


class UnloadAdapterRequest(msgspec.Struct, forbid_unknown_fields=True):
    lora_name: str
    lora_int_id: int | None = None  # vLLM's second way to name it; ignored


class AdapterNameRequest(msgspec.Struct, forbid_unknown_fields=True):
    lora_name: str


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Any] | None = None  # with messages
    add_special_tokens: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[int]
    model: str | None = None


# Field -> values that ask for nothing; anything else is refused as not supported.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "logits_processors": ([],),
    "use_beam_search": (False,),
    "lora_request": (),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "verbosity": ("medium",),
    "web_search_options": (),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "length_penalty": (1.0,),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "detokenize": (True,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "kv_transfer_params": ({},),
    "vllm_xargs": ({},),
}
