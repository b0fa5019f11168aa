"""What fields that several bodies have mean: which prefix texts get, what becomes of long ones, what is left raw."""

from __future__ import annotations

from typing import get_args

from ...errors import UserError
from ..openai.request_types import TokenizeRequest
from .request_types import EmbeddingRequest, InputType, PoolingFields, PoolingRequest, ScoreRequest, TextFields
from .texts import Cut, Text, texts_or_ids

QUERY_TYPES = ("query", "search_query")
DOCUMENT_TYPES = tuple(name for name in get_args(InputType) if name not in QUERY_TYPES)
# The names of both sides in vLLM's bodies of /score.
SIDES = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))


def texts_of(body: TextFields, is_query: bool = False) -> list[Text] | TokenizeRequest:
    """What is pooled: texts, or the conversation that is one. Raises `UserError`."""
    if body.input is not None:
        for name in ("messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
            if getattr(body, name):
                raise UserError(f"{name} is for a conversation, and input is given; send one of them", param=name)
        texts = texts_or_ids(body.input, "input", is_query)
        if body.add_special_tokens is False and any(text.token_ids is None for text in texts):
            raise _unsupported_special_tokens("false", "texts are read with what the tokenizer puts around them")
        return texts
    if not body.messages:
        raise UserError("nothing is to be pooled; send input, or a conversation as messages", param="input")
    if body.add_special_tokens:
        raise _unsupported_special_tokens("true", "the chat template writes all of a conversation")
    return TokenizeRequest(
        messages=body.messages,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _unsupported_special_tokens(value: str, why_not: str) -> UserError:
    return UserError(
        f"add_special_tokens is {value}, and {why_not}; leave it out, or send token ids",
        param="add_special_tokens",
        code="unsupported",
    )


def activation(body: EmbeddingRequest | PoolingRequest) -> bool | None:
    """Whether embeddings are scaled to length 1, and outputs made probabilities; None: as the adapter says."""
    return body.normalize if body.normalize is not None else body.use_activation


def cut_of(fields: PoolingFields, cuts: bool = False, max_document_tokens: int | None = None) -> Cut:
    """What becomes of long texts; `cuts` where the body says nothing of it. Raises `UserError`."""
    limit = fields.truncate_prompt_tokens
    if limit is None:
        return Cut(cuts, None, max_document_tokens)
    if limit != -1 and limit < 1:
        raise UserError(
            f"truncate_prompt_tokens is {limit}; at least 1 is allowed, or -1 for what fits",
            param="truncate_prompt_tokens",
        )
    return Cut(True, None if limit == -1 else limit, max_document_tokens)


def is_query(input_type: str | None, prompt_name: str | None) -> bool:
    """Whether texts get the prefix of those that are searched with. Raises `UserError`."""
    names = {name for name in (input_type, prompt_name) if name is not None}
    unknown = next((name for name in names if name not in (*QUERY_TYPES, *DOCUMENT_TYPES)), None)
    if unknown is not None:
        raise UserError(
            f"prompt_name is {unknown[:64]!r}; one of {', '.join((*QUERY_TYPES, *DOCUMENT_TYPES))} is expected",
            param="prompt_name",
        )
    kinds = {name in QUERY_TYPES for name in names}
    if len(kinds) > 1:
        raise UserError(f"input_type is {input_type!r} and prompt_name {prompt_name!r}; send one", param="prompt_name")
    return True in kinds


def sides(body: ScoreRequest) -> tuple[tuple[str, str | list[str]], tuple[str, str | list[str]]]:
    """Both sides, each with its name. Raises `UserError` unless there is one of each, of one body of vLLM's."""
    given = {name for names in SIDES for name in names if getattr(body, name) is not None}
    for first, second in SIDES:
        if given == {first, second}:
            return (first, getattr(body, first)), (second, getattr(body, second))
    pairs = "; ".join(f"{first} and {second}" for first, second in SIDES)
    raise UserError(f"two sides are compared: send {pairs}", param="text_1")
