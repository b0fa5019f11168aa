"""Bodies of POST /chat/completions and their answers, as OpenAI's API has them and others copy it.

Owns what an answer must hold to be one, and the wording of what came instead. Knows nothing of HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec

from ..errors import shortened
from .asks import Answer, Ask, TokenLogprob
from .errors import TeacherError
from .spec import TeacherSpec

FINISHED = ("stop", "length")
_Count = Annotated[int, msgspec.Meta(ge=0)]  # less than none would give back what was spent
_SMALLER = frozenset({"mini", "nano", "lite", "small", "tiny"})  # in a name: another model, and no version


class _Token(msgspec.Struct):
    token: str
    logprob: float
    octets: list[int] | None = msgspec.field(default=None, name="bytes")
    top_logprobs: list[_Token] = []

    def read(self) -> bytes:
        return bytes(self.octets) if self.octets is not None else self.token.encode()


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Count
    completion_tokens: _Count


class _Charged(msgspec.Struct):
    usage: _Usage | None = None


class Completion(msgspec.Struct):
    """The parts of an answer that are read."""

    choices: list[_Choice]
    model: str | None = None
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class Dialect:
    """Where endpoints differ: the name of the longest answer's field, and whether schemas are asked for strictly.

    Some have that for a part of JSON Schema alone.
    """

    limit_name: str = "max_tokens"  # the name that most know
    is_strict: bool = True

    def after(self, error: str) -> Dialect | None:
        """The one to try when this one was refused; None where `error` is about something else."""
        if self.limit_name == "max_tokens" and "max_completion_tokens" in error:
            return replace(self, limit_name="max_completion_tokens")
        if self.is_strict and ("response_format" in error or "schema" in error):
            return replace(self, is_strict=False)
        return None


def body_of(ask: Ask, spec: TeacherSpec, n: int, seed: int | None, dialect: Dialect) -> dict[str, Any]:
    """What is sent for `n` of the samples."""
    body: dict[str, Any] = {
        "model": spec.model,
        "messages": list(ask.messages),
        dialect.limit_name: ask.max_tokens,
        "temperature": ask.temperature,
        "top_p": ask.top_p,
    }
    if n > 1:
        body["n"] = n
    if seed is not None:
        body["seed"] = seed
    if ask.stop:
        body["stop"] = list(ask.stop)
    if ask.schema is not None:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": dict(ask.schema), "strict": dialect.is_strict},
        }
    if ask.top_logprobs:
        body |= {"logprobs": True, "top_logprobs": ask.top_logprobs}
    return {name: value for name, value in {**body, **spec.fields}.items() if value is not None}


def read_completion(data: bytes, spec: TeacherSpec) -> Completion:
    """Raises `TeacherError` that says what came instead of an answer."""
    try:
        completion = msgspec.json.decode(data, type=Completion)
    except msgspec.ValidationError as error:
        raise _malformed(spec, f"an answer that is not one of the API's ({error})", data) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(spec, f"an answer that is not JSON ({error})", data) from None
    if not completion.choices:
        raise _malformed(spec, "an answer without choices", data)
    if completion.model and not spec.any_model and not same_model(spec.model, completion.model):
        raise TeacherError(
            f"{spec.name} answered as {completion.model[:100]!r}, and {spec.model!r} was asked; give that name, or "
            "--teacher-any-model if it is meant",
            ends_run=True,
        )
    return completion


def answers_of(completion: Completion, spec: TeacherSpec) -> tuple[list[Answer], list[str]]:
    """Its answers, and what stands in place of those that it does not give; choices that were cut are neither.

    Raises `TeacherError` where all are cut.
    """
    prompt_tokens = completion.usage.prompt_tokens if completion.usage is not None else 0
    is_single = completion.usage is not None and len(completion.choices) == 1
    answers, refused = [], []
    for choice in completion.choices:
        message = choice.message
        if message.refusal or choice.finish_reason == "content_filter":
            told = shortened(message.refusal or "its content filter cut the answer", 200)
            refused.append(f"{spec.name} refuses to answer: {told}")
        elif choice.finish_reason is None:
            continue
        elif choice.finish_reason not in FINISHED:
            refused.append(f"{spec.name}: {_odd_end(choice)}")
        else:
            answers.append(
                Answer(
                    text=message.content or "",
                    finish_reason=choice.finish_reason,
                    prompt_tokens=prompt_tokens,
                    completion_tokens=completion.usage.completion_tokens if is_single and completion.usage else None,
                    reasoning=message.reasoning_content or message.reasoning or None,
                    logprobs=_logprobs(choice.logprobs),
                )
            )
    if not answers and not refused:
        raise TeacherError(f"{spec.name}: {_odd_end(completion.choices[0])}", retryable=True)
    return answers, refused


def _odd_end(choice: _Choice) -> str:
    return f"finish_reason is {choice.finish_reason!r}; an answer ends with one of {', '.join(FINISHED)}"


def tokens_in(data: bytes) -> tuple[int, int] | None:
    """The prompt's and the answer's tokens that a body says are charged, whatever else it holds; None: it does not."""
    try:
        usage = msgspec.json.decode(data, type=_Charged).usage
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return (usage.prompt_tokens, usage.completion_tokens) if usage is not None else None


def same_model(asked: str, answered: str) -> bool:
    """Whether `answered` is a version of `asked`: gpt-4o-2024-08-06 of gpt-4o, but not gpt-4o-mini.

    Names are compared without their vendors.
    """
    names = (re.sub(r"[-:]latest$", "", name.lower().rstrip("/").rpartition("/")[2]) for name in (asked, answered))
    shorter, longer = sorted(names, key=len)
    rest = longer[len(shorter) :]
    is_version = rest[:1] in ("", "-", ":", "@", ".", "_") and not _SMALLER & set(re.split(r"[-:@._]", rest))
    return longer.startswith(shorter) and is_version


def error_text(data: bytes) -> str:
    """What an endpoint says is wrong: its message, or the beginning of whatever it sent."""
    try:
        value: Any = msgspec.json.decode(data)
        for key in ("error", "message", "detail"):
            if isinstance(value, dict) and key in value:
                value = value[key]
    except (msgspec.DecodeError, UnicodeDecodeError):
        value = data[:1000].decode("utf-8", "replace")
    return shortened(value if isinstance(value, str) else msgspec.json.encode(value).decode(), 300)


def error_code(data: bytes) -> str:
    """Its code or type, in OpenAI's shape."""
    try:
        error: Any = msgspec.json.decode(data)["error"]
        return f"{error.get('code')} {error.get('type')}"
    except (msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
        return ""


def _logprobs(given: _Logprobs | None) -> tuple[TokenLogprob, ...] | None:
    if given is None or given.content is None:
        return None
    return tuple(TokenLogprob(item.read(), item.logprob, _top(item.top_logprobs)) for item in given.content)


def _top(items: Sequence[_Token]) -> tuple[tuple[bytes, float], ...]:
    return tuple((item.read(), item.logprob) for item in items)


def _malformed(spec: TeacherSpec, what: str, data: bytes) -> TeacherError:
    shown = shortened(data[:1000].decode("utf-8", "replace"), 200) if data else "nothing"
    return TeacherError(f"{spec.name} sent {what}: {shown}", retryable=True, status=502)
