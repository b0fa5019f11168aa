"""Texts that are pooled, as token ids: with an adapter's prefixes, suffix and end, cut to what it takes.

The server and the trainer both go through here, so an adapter reads what it was trained on. A plain text becomes what
`tokenizer(text)` of transformers makes of it. What a text spells of a special token is letters, as in conversations;
prefixes and suffix are the adapter's own and may hold special tokens.
"""

from __future__ import annotations

from typing import Protocol

from ..errors import ModelError
from .hidden_chat import Marks
from .tokenizer import TextTokenizer


class TextShape(Protocol):
    """What an adapter says of its texts; `PoolingInfo` has it."""

    @property
    def query_prefix(self) -> str: ...
    @property
    def document_prefix(self) -> str: ...
    @property
    def suffix(self) -> str: ...
    @property
    def append_eos(self) -> bool: ...
    @property
    def max_tokens(self) -> int | None: ...


def embedded_ids(tokenizer: TextTokenizer, shape: TextShape, text: str, *, is_query: bool) -> list[int]:
    """Of a text that is embedded: one that is searched with, or one that is found."""
    return _ids(tokenizer, shape, [(shape.query_prefix if is_query else shape.document_prefix, text)])


def pair_ids(tokenizer: TextTokenizer, shape: TextShape, query: str, document: str) -> list[int]:
    """Of a query with a document that is scored for it; the document's end is cut first."""
    return _ids(tokenizer, shape, [(shape.query_prefix, query), (shape.document_prefix, document)])


def classified_ids(tokenizer: TextTokenizer, shape: TextShape, text: str) -> list[int]:
    """Of a text that is classified."""
    return _ids(tokenizer, shape, [("", text)])


def _ids(tokenizer: TextTokenizer, shape: TextShape, parts: list[tuple[str, str]]) -> list[int]:
    """`parts` are (prefix, text); what is cut stands before the suffix."""
    whole = "".join(prefix + text for prefix, text in parts)
    # Not only within a text: two that follow each other may spell one together.
    if any(whole.count(token) != sum(prefix.count(token) for prefix, _ in parts) for token in tokenizer.special_tokens):
        marks = Marks()
        marked = "".join(prefix + marks.new(text) for prefix, text in parts)
        ids = tokenizer.encode("") + tokenizer.encode_marked(marked, marks)  # the former stands in front of every text
    else:
        ids = tokenizer.encode(whole)
    end = tokenizer.encode(shape.suffix, add_special_tokens=False) if shape.suffix else []
    if shape.append_eos:
        if tokenizer.eos_token_id is None:
            raise ModelError("append_eos: the tokenizer has no eos_token; name one in tokenizer_config.json")
        end.append(tokenizer.eos_token_id)
    if shape.max_tokens is not None:
        ids = ids[: max(0, shape.max_tokens - len(end))]
    return ids + end
