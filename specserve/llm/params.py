"""What a call may ask for, in vLLM's words: sampling, structured output, an adapter; and all of it as a request body.

Values are not checked here: they become fields of the HTTP API's bodies, whose own checks name field, value and limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from ..errors import UserError

MAX_PROMPT_LOGPROBS = 20


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True):
    """What the output must be: exactly one of these."""

    json: Any = None  # a JSON Schema as a dict or as text, or a pydantic model
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None  # Lark's
    json_object: bool | None = None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How outputs are sampled; names and defaults are vLLM's, and `docs/api.md` has the ranges.

    `max_tokens` None: as many as the context holds. `seed` None: another one each time. `logprobs` n: of the sampled
    token and of the n most likely ones; `prompt_logprobs` the same of each prompt token. `structured_outputs` or, as in
    OpenAI's API, `response_format` say what the output must be. `speculation`, `max_draft_tokens` and `prediction`, the
    text that is expected, make the output come sooner and never another one. `trace`: outputs say who guessed what.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    response_format: Any = None
    speculation: Literal["auto", "off", "ngram", "fixed"] = "auto"
    max_draft_tokens: int | None = None
    prediction: str | None = None
    trace: bool = False
    priority: int = 0
    cache_salt: str | None = None

    def body(self, is_chat: bool) -> dict[str, Any]:
        """The fields of a request body that say the same. Raises `UserError`."""
        if self.prompt_logprobs is not None and not 0 <= self.prompt_logprobs <= MAX_PROMPT_LOGPROBS:
            raise UserError(
                f"prompt_logprobs is {self.prompt_logprobs}; 0 to {MAX_PROMPT_LOGPROBS} is allowed",
                param="prompt_logprobs",
            )
        names = (
            "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty", "seed", "include_stop_str_in_output", "ignore_eos", "skip_special_tokens",
            "response_format", "priority", "cache_salt",
        )  # fmt: skip
        body = {name: getattr(self, name) for name in names}
        body["speculation"] = {
            "mode": self.speculation,
            "max_draft_tokens": self.max_draft_tokens,
            "trace": self.trace,
        }
        body["stop"] = self.stop if self.stop is None or isinstance(self.stop, str) else list(self.stop)
        body["stop_token_ids"] = None if self.stop_token_ids is None else list(self.stop_token_ids)
        if self.logit_bias is not None:
            body["logit_bias"] = {str(token): bias for token, bias in self.logit_bias.items()}
        if self.structured_outputs is not None:
            body["structured_outputs"] = _structured(self.structured_outputs)
        if self.prediction is not None:
            body["prediction"] = {"type": "content", "content": self.prediction}
        if is_chat and self.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.logprobs}
        elif self.logprobs is not None:
            body["logprobs"] = self.logprobs
        if self.max_tokens is not None or is_chat:
            body |= {"max_tokens": self.max_tokens, "min_tokens": self.min_tokens}
        else:
            body["max_tokens"] = 1  # a completion's default is 16: the room is known when the prompt is read
        return {name: value for name, value in body.items() if value is not None}


class LoRARequest(msgspec.Struct, frozen=True):
    """An adapter by name and directory, as in vLLM; `lora_int_id` is not needed and means nothing.

    With `load_inplace` the name is given to this directory though another one has it.
    """

    lora_name: str
    lora_int_id: int = 0
    lora_path: str = ""
    load_inplace: bool = False


def check_texts(body: Mapping[str, Any]) -> None:
    """Raise `UserError` for a text that cannot be written as UTF-8, which JSON would not have let through."""
    for field, value in body.items():
        try:
            msgspec.json.encode(value, enc_hook=lambda other: None)
        except UnicodeEncodeError:
            raise UserError(f"{field} holds half of a surrogate pair; give whole characters", param=field) from None
        except (TypeError, ValueError):  # no JSON at all: the field's own check says so
            continue


def _structured(wanted: StructuredOutputsParams | Mapping[str, Any]) -> dict[str, Any]:
    fields = dict(wanted) if isinstance(wanted, Mapping) else msgspec.structs.asdict(wanted)
    body = {name: value for name, value in fields.items() if value is not None}
    schema_of = getattr(body.get("json"), "model_json_schema", None)
    return body if schema_of is None else body | {"json": schema_of()}
