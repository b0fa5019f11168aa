"""From request bodies to `SamplingParams`: every range checked, each error names field, value, limit."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ...config import ServeConfig
from ...errors import UserError
from ...messages import EngineInfo, SamplingParams, Speculation
from .request_types import UNSUPPORTED, ChatRequest, CompletionRequest, GenerationFields, SpeculationOptions

MAX_CHOICES = 64  # n, and n times the number of prompts
MAX_STOPS = 16
MAX_STOP_LEN = 512
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGPROBS = 20
MAX_SALT_LEN = 1024
LOWEST_PRIORITY = 1000
MAX_TRACED_OUTPUTS = 16  # of a request: a trace takes far more memory than its text
MAX_DEADLINE_MS = 86_400_000.0
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as in OpenAI's API


def check_supported(request: GenerationFields) -> None:
    """Refuse fields that would change the output and are not served."""
    check_cache_salt(request.cache_salt)
    if isinstance(request, ChatRequest):
        for name in ("add_special_tokens", "echo"):
            if getattr(request, name):
                raise UserError(
                    f"{name!r} is not supported in chat, whose template writes the prompt; leave it out",
                    param=name,
                    code="unsupported",
                )
    refuse_unserved(request, UNSUPPORTED)


def check_cache_salt(salt: str | None) -> None:
    if salt is not None and len(salt) > MAX_SALT_LEN:
        raise UserError(
            f"cache_salt has {len(salt)} characters; at most {MAX_SALT_LEN} are allowed", param="cache_salt"
        )


def refuse_unserved(fields: object, neutral: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse those of `fields` that ask for something which is not served: `neutral` has the values that do not."""
    for name, values in neutral.items():
        value = getattr(fields, name, None)
        if value is not None and value not in values:
            raise UserError(f"{name!r} is not supported by this server; leave it out", param=name, code="unsupported")


def refuse_trace(speculation: SpeculationOptions | None, where: str, instead: str) -> None:
    """Refuse a trace in answers of `where`, which have no place for one."""
    if speculation is not None and speculation.trace:
        raise UserError(
            f"speculation.trace has no place in {where}; leave it out, or ask {instead}",
            param="speculation.trace",
            code="unsupported",
        )


def sampling_params(
    request: CompletionRequest | ChatRequest, info: EngineInfo, prompt_lens: Sequence[int]
) -> SamplingParams:
    """The sampling of one request whose prompts have `prompt_lens` tokens."""
    is_chat = isinstance(request, ChatRequest)
    room = info.max_model_len - max(prompt_lens)
    max_tokens = _max_tokens(request, room, max(prompt_lens), info)
    temperature = _number(request, "temperature", 0.0, 2.0, 1.0)
    top_k = _integer(request, "top_k", -1, info.vocab_size, 0)
    logprobs, prompt_logprobs = _logprobs(request)
    stop = _stops(request.stop)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=_number(request, "top_p", 0.0, 1.0, 1.0, open_low=True),
        top_k=max(top_k, 0),
        min_p=_number(request, "min_p", 0.0, 1.0, 0.0),
        presence_penalty=_number(request, "presence_penalty", -2.0, 2.0, 0.0),
        frequency_penalty=_number(request, "frequency_penalty", -2.0, 2.0, 0.0),
        repetition_penalty=_number(request, "repetition_penalty", 0.0, 10.0, 1.0, open_low=True),
        logit_bias=_logit_bias(request.logit_bias, info.vocab_size),
        stop=stop,
        stop_token_ids=_stop_ids(request.stop_token_ids, info.vocab_size),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        ignore_eos=bool(request.ignore_eos),
        min_tokens=_integer(request, "min_tokens", 0, max_tokens, 0),
        seed=secrets.randbits(64)
        if request.seed is None
        else _integer(request, "seed", -(2**63), 2**63 - 1, 0) % 2**64,
        logprobs=logprobs,
        prompt_logprobs=None if is_chat else prompt_logprobs,
        skip_special_tokens=request.skip_special_tokens is not False,
        detokenize=bool(stop),  # only then does the engine need the text; else the server writes it
    )


def speculation_params(request: GenerationFields, config: ServeConfig, num_outputs: int = 1) -> Speculation:
    """The speculation of a request of `num_outputs` sequences."""
    options = request.speculation
    traces = options is not None and options.trace
    if traces and num_outputs > MAX_TRACED_OUTPUTS:
        raise UserError(
            f"speculation.trace is for at most {MAX_TRACED_OUTPUTS} outputs of a request, and n or best_of times the "
            f"number of prompts is {num_outputs}; ask for fewer, or leave the trace out",
            param="speculation.trace",
        )
    if config.speculation == "off":
        return Speculation("off", trace=traces)
    if options is None:
        return Speculation("auto", min(Speculation().max_draft_tokens, config.max_draft_tokens))
    limit = options.max_draft_tokens
    if limit is None:
        limit = min(Speculation().max_draft_tokens, config.max_draft_tokens)
    if not 0 <= limit <= config.max_draft_tokens:
        raise UserError(
            f"speculation.max_draft_tokens is {limit}; 0 to {config.max_draft_tokens} is allowed (--max-draft-tokens)",
            param="speculation.max_draft_tokens",
        )
    return Speculation(options.mode if limit else "off", limit, traces)


class HasPriority(Protocol):
    priority: int | None


def priority_of(request: HasPriority, config: ServeConfig) -> int:
    """Lower is sooner; how low, the server's settings say."""
    value, best = request.priority or 0, config.highest_priority
    if not best <= value <= LOWEST_PRIORITY:
        raise UserError(
            f"priority is {value}; {best} to {LOWEST_PRIORITY} is allowed, lower is sooner (--highest-priority)",
            param="priority",
        )
    return value


class HasDeadline(Protocol):
    deadline_ms: float | None


def deadline_s(request: HasDeadline) -> float | None:
    """Seconds from its arrival; None: it has no deadline of its own."""
    if request.deadline_ms is None:
        return None
    return _number(request, "deadline_ms", 0.0, MAX_DEADLINE_MS, 0.0, open_low=True) / 1e3


def choice_counts(request: CompletionRequest | ChatRequest, num_prompts: int) -> tuple[int, int]:
    """(n, best_of): how many choices of a prompt are answered, and of how many sequences they are the best."""
    n = _integer(request, "n", 1, MAX_CHOICES, 1)
    best_of = _integer(request, "best_of", n, MAX_CHOICES, n)
    if best_of > n and request.stream:
        raise UserError(
            f"best_of is {best_of} and n is {n}: the best are known at the end, so they cannot be streamed; "
            "leave out stream or best_of",
            param="best_of",
        )
    if best_of * num_prompts > MAX_CHOICES:
        name = "n" if best_of == n else "best_of"
        raise UserError(
            f"{name} times the number of prompts is {best_of * num_prompts}; at most {MAX_CHOICES} is allowed",
            param=name,
        )
    return n, best_of


def _max_tokens(request: CompletionRequest | ChatRequest, room: int, prompt_len: int, info: EngineInfo) -> int:
    name, value = "max_tokens", request.max_tokens
    if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        name, value = "max_completion_tokens", request.max_completion_tokens
    echo_only = isinstance(request, CompletionRequest) and bool(request.echo)
    if value is None:
        value = room if isinstance(request, ChatRequest) else min(DEFAULT_MAX_TOKENS, room)
        value = max(value, 0 if echo_only else 1)
    if value < (0 if echo_only else 1):
        raise UserError(f"{name} is {value}; at least {0 if echo_only else 1} is needed", param=name)
    if value > room:
        raise UserError(
            f"the prompt has {prompt_len} tokens and {name} is {value}: {prompt_len + value} in all, but the context "
            f"holds {info.max_model_len}; shorten the prompt or ask for at most {max(room, 0)}",
            param=name,
            code="context_length_exceeded",
        )
    return value


def _logprobs(request: CompletionRequest | ChatRequest) -> tuple[int | None, int | None]:
    """(logprobs of the output, logprobs of the prompt)."""
    if isinstance(request, ChatRequest):
        top = _integer(request, "top_logprobs", 0, MAX_LOGPROBS, 0)
        if request.top_logprobs is not None and not request.logprobs:
            raise UserError("top_logprobs needs logprobs=true", param="top_logprobs")
        return (top if request.logprobs else None), None
    if request.logprobs is None:
        return None, None
    num = _integer(request, "logprobs", 0, MAX_LOGPROBS, 0)
    return num, num if request.echo else None


def _number(request: Any, name: str, low: float, high: float, default: float, open_low: bool = False) -> float:
    value = getattr(request, name)
    if value is None:
        return default
    if not (low <= value <= high) or (open_low and value == low):
        bounds = f"more than {low:g} and at most {high:.12g}" if open_low else f"{low:g} to {high:g}"
        raise UserError(f"{name} is {value:.12g}; {bounds} is allowed", param=name)
    return float(value)


def _integer(request: Any, name: str, low: int, high: int, default: int) -> int:
    value = getattr(request, name)
    if value is None:
        return default
    if not low <= value <= high:
        raise UserError(f"{name} is {value}; {low} to {high} is allowed", param=name)
    return int(value)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MAX_STOPS:
        raise UserError(f"stop has {len(stops)} strings; at most {MAX_STOPS} are allowed", param="stop")
    for text in stops:
        if not 1 <= len(text) <= MAX_STOP_LEN:
            raise UserError(f"a stop string has {len(text)} characters; 1 to {MAX_STOP_LEN} are allowed", param="stop")
    return tuple(stops)


def _stop_ids(ids: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    return tuple(_checked_ids("stop_token_ids", ids or [], MAX_STOP_TOKEN_IDS, vocab_size, lambda token: token))


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    def parse(key: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,20}", key):
            raise UserError(f"logit_bias: {key[:64]!r} is not a token id", param="logit_bias")
        return int(key)

    ids = _checked_ids("logit_bias", list(bias or {}), MAX_LOGIT_BIAS, vocab_size, parse)
    for value in (bias or {}).values():
        if not -100.0 <= value <= 100.0:
            raise UserError(f"logit_bias: {value:g} is out of range; -100 to 100 is allowed", param="logit_bias")
    return dict(zip(ids, (bias or {}).values(), strict=True))


def _checked_ids(
    name: str, values: Sequence[Any], max_num: int, vocab_size: int, parse: Callable[[Any], int]
) -> list[int]:
    if len(values) > max_num:
        raise UserError(f"{name} has {len(values)} entries; at most {max_num} are allowed", param=name)
    ids = [parse(value) for value in values]
    for token in ids:
        if not 0 <= token < vocab_size:
            raise UserError(f"{name}: token id {token} is outside 0..{vocab_size - 1}", param=name)
    return ids
