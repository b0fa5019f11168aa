"""From LoRAX's parameters to the fields of /v1/completions: what LoRAX has and this server has not is refused by name.

What LoRAX means otherwise: greedy unless sampling is asked for, stop strings kept in the text, one field for a grammar.
"""

from __future__ import annotations

from typing import Any

from ...errors import UserError
from ..openai.conversion import MAX_CHOICES, MAX_LOGPROBS, refuse_trace, refuse_unserved
from ..openai.request_types import CompletionRequest
from .types import LoraxParameters

# Field -> values that ask for nothing; anything else is refused as not supported.
REFUSED: dict[str, tuple[float, ...]] = {
    "merged_adapters": (),
    "typical_p": (1.0,),
    "watermark": (False,),
    "top_n_tokens": (),
}


def samples(parameters: LoraxParameters) -> bool:
    """LoRAX samples when it is told to or when a sampling parameter is set; temperature 0 is greedy either way."""
    if parameters.temperature == 0:
        return False
    return bool(
        parameters.do_sample
        or parameters.temperature not in (None, 1.0)
        or parameters.top_k
        or (parameters.top_p is not None and parameters.top_p < 1.0)
    )


def check_parameters(inputs: str, parameters: LoraxParameters, stream: bool) -> None:
    """Refuse, by name, what LoRAX has and this server has not, and what LoRAX refuses itself. Raises `UserError`."""
    if not inputs:
        raise UserError("inputs is empty; send a text", param="inputs")
    refuse_unserved(parameters, REFUSED)
    refuse_trace(parameters.speculation, "LoRAX's answers", "/v1/completions")
    check_adapter_source(parameters.adapter_source)
    for name, low, high in (
        ("best_of", 1, MAX_CHOICES),
        ("return_k_alternatives", 1, MAX_LOGPROBS),
        ("truncate", 1, None),
        ("max_new_tokens", 1, None),
        ("top_k", 1, None),
        ("seed", 0, 2**64 - 1),
    ):
        value = getattr(parameters, name)
        if value is not None and (value < low or (high is not None and value > high)):
            bounds = f"at least {low}" if high is None else f"{low} to {high}"
            raise UserError(f"{name} is {value}; {bounds} is allowed", param=name)
    if (parameters.best_of or 1) > 1:
        if stream:
            raise UserError("best_of above 1 cannot be streamed: the best is known at the end", param="best_of")
        if not samples(parameters):
            raise UserError("best_of above 1 needs sampling: set do_sample or temperature", param="best_of")
    if stream and parameters.decoder_input_details:
        raise UserError(
            "decoder_input_details is not part of a stream; POST /generate has it", param="decoder_input_details"
        )


def check_adapter_source(source: str | None) -> None:
    if source not in (None, "", "local"):
        raise UserError(
            f"adapter_source is {source[:64]!r}; adapters come from the server's folder: send local",
            param="adapter_source",
        )


def completion_request(
    parameters: LoraxParameters, adapter: str | None, ids: list[int], max_tokens: int, stream: bool
) -> CompletionRequest:
    """The same request in the words of /v1/completions."""
    temperature = (1.0 if parameters.temperature is None else parameters.temperature) if samples(parameters) else 0.0
    needs_logprobs = stream or parameters.details or parameters.decoder_input_details
    seed = parameters.seed
    return CompletionRequest(
        prompt=ids,
        adapter_id=adapter,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        repetition_penalty=parameters.repetition_penalty,
        frequency_penalty=parameters.frequency_penalty,
        presence_penalty=parameters.presence_penalty,
        seed=seed - 2**64 if seed is not None and seed >= 2**63 else seed,
        stop=parameters.stop,
        include_stop_str_in_output=True,
        ignore_eos=parameters.ignore_eos_token,
        best_of=parameters.best_of,
        stream=stream,
        logprobs=(parameters.return_k_alternatives or 0) if needs_logprobs else None,
        echo=parameters.decoder_input_details,
        speculation=parameters.speculation,
        cache_salt=parameters.cache_salt,
        priority=parameters.priority,
        deadline_ms=parameters.deadline_ms,
        **_grammar(parameters),
    )


def _grammar(parameters: LoraxParameters) -> dict[str, Any]:
    """Structured output in the fields of /v1; several at once are refused."""
    found: dict[str, dict[str, Any]] = {}
    if parameters.response_format is not None:
        found["response_format"] = {"response_format": parameters.response_format}
    if parameters.schema is not None:
        found["schema"] = {"response_format": {"type": "json_object", "schema": parameters.schema}}
    if (grammar := parameters.grammar) is not None:
        kind = "regex" if grammar.type == "regex" else "json"
        found["grammar"] = {"structured_outputs": {kind: grammar.value}}
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} ask for one grammar each; send one of them", param=next(iter(found)))
    return next(iter(found.values()), {})
