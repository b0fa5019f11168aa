"""What a request wants pooled, as texts with names, and these as token ids: what is empty, too long, too much is said.

A text that is longer than the adapter or the context takes is cut at its end where the request wants that, and refused
where not; never cut in silence. Prefixes, suffix and end are `text/pooled_text`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ...adapter_kinds import AdapterType, PoolingInfo
from ...errors import UserError
from ...messages import EngineInfo
from ...text.known_tokens import unknown
from ...text.pooled_text import classified_ids, embedded_ids, pair_ids
from ...text.tokenizer import TextTokenizer

MAX_TEXTS = 2048  # of a request, as OpenAI has it
MAX_TOKENS = 1 << 20  # of all of them


@dataclass(frozen=True, slots=True)
class Text:
    """One text to pool, or its token ids; with a `query`, the document of a pair."""

    name: str  # as errors call it: input[3]
    text: str = ""
    token_ids: list[int] | None = None
    is_query: bool = False  # searched with; else found
    query: str | None = None

    @property
    def param(self) -> str:
        """The field of the request that it is in."""
        return self.name.partition("[")[0]


@dataclass(frozen=True, slots=True)
class Cut:
    """What becomes of long texts. `max_tokens`: of a text; `max_document_tokens`: of a pair's document by itself."""

    cuts: bool = False
    max_tokens: int | None = None
    max_document_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    ids: list[list[int]]
    cut: list[int]  # which of them were cut


def check_count(values: Sequence[object], name: str, least: int = 1) -> None:
    """Raises `UserError` for a list that is empty or has too many texts."""
    if len(values) < least:
        raise UserError(f"{name} is an empty list; send at least one text", param=name)
    if len(values) > MAX_TEXTS:
        raise UserError(
            f"{name} has {len(values)} entries; at most {MAX_TEXTS} are allowed in a request: send several",
            param=name,
            code="too_many_inputs",
        )


def listed(texts: str | Sequence[str], name: str, *, is_query: bool = False, query: str | None = None) -> list[Text]:
    """A text, or a list of texts, none of them empty. Raises `UserError`."""
    if not isinstance(texts, str):
        check_count(texts, name)
    named = [(name, texts)] if isinstance(texts, str) else [(f"{name}[{idx}]", text) for idx, text in enumerate(texts)]
    for each, text in named:
        if not text:
            raise UserError(f"{each} is an empty text; send at least one character, or leave it out", param=name)
    return [Text(each, text, is_query=is_query, query=query) for each, text in named]


def texts_or_ids(value: Any, name: str, is_query: bool = False) -> list[Text]:
    """A text, token ids, or a list of both. Raises `UserError`."""
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return [Text(name, token_ids=value)]
    if isinstance(value, str):
        return listed(value, name, is_query=is_query)
    check_count(value, name)
    found = []
    for idx, item in enumerate(value):
        if isinstance(item, str) and item:
            found.append(Text(f"{name}[{idx}]", item, is_query=is_query))
        elif isinstance(item, list) and item and all(type(token) is int for token in item):
            found.append(Text(f"{name}[{idx}]", token_ids=item))
        else:
            what = "is empty" if item in ("", []) else f"is {type(item).__name__}"
            raise UserError(f"{name}[{idx}] {what}; send a text, or a list of token ids", param=name)
    return found


def reading_size(texts: Sequence[Text]) -> int:
    """The characters of all that is read; each text costs something by itself."""
    return sum(64 + len(text.text) + len(text.query or "") + len(text.token_ids or ()) for text in texts)


def tokenized(
    texts: Sequence[Text],
    tokenizer: TextTokenizer,
    kind: AdapterType,
    pooling: PoolingInfo,
    info: EngineInfo,
    cut: Cut,
) -> TokenizedTexts:
    """The token ids of each text, with what the adapter puts around them. Raises `UserError`."""
    limits = (info.max_model_len, info.num_kv_blocks * info.block_size, pooling.max_tokens, cut.max_tokens)
    reader = _Reader(tokenizer, kind, pooling, info.vocab_size, min(limit for limit in limits if limit), cut)
    reader.check_queries(texts)
    found, was_cut, total = [], [], 0
    for idx, text in enumerate(texts):
        ids, is_cut = reader.ids(text)
        if not ids:
            raise UserError(f"{text.name} has no tokens; send a text that has some", param=text.param)
        total += len(ids)
        if total > MAX_TOKENS:
            raise _too_much(text.param, total)
        found.append(ids)
        if is_cut:
            was_cut.append(idx)
    return TokenizedTexts(found, was_cut)


class _Reader:
    """Reads the texts of one request; one of them has at most `limit` tokens."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        kind: AdapterType,
        pooling: PoolingInfo,
        vocab_size: int,
        limit: int,
        cut: Cut,
    ):
        self._tokenizer, self._kind, self._cut = tokenizer, kind, cut
        self._vocab_size, self._limit = vocab_size, limit
        self._whole = msgspec.structs.replace(pooling, max_tokens=None)
        self._shortened = msgspec.structs.replace(pooling, max_tokens=limit)

    def check_queries(self, texts: Sequence[Text]) -> None:
        """Raises `UserError` for queries that leave their documents no room, or are too much with all of them.

        Before any pair is read: each document costs its query once more.
        """
        queries = [text.query for text in texts if text.query is not None]
        num_tokens = {}
        for query in set(queries):
            self._tokenizer.check_len([query], self._limit, "query")
            num_tokens[query] = len(self._tokenizer.encode_literal(query))
            if num_tokens[query] >= self._limit:
                raise UserError(
                    f"the query has {num_tokens[query]} tokens; with a document at most {self._limit} are possible: "
                    "shorten it",
                    param="query",
                    code="context_length_exceeded",
                )
        if (total := sum(num_tokens[query] for query in queries)) > MAX_TOKENS:
            raise _too_much("documents", total)

    def ids(self, text: Text) -> tuple[list[int], bool]:
        """(token ids, whether they were cut)."""
        if text.token_ids is not None:
            ids = self._checked(text)
            if len(ids) <= self._limit:
                return ids, False
            self._refuse_long(text, str(len(ids)))
            return ids[: self._limit], True
        document, is_cut = self._document(text)
        read = self._read_of(text, document)
        if (least := self._tokenizer.min_num_tokens(document)) > self._limit:
            self._refuse_long(text, f"at least {least}")
        ids = read(self._whole)
        if ids and (token := max(ids)) >= self._vocab_size:
            reason = unknown(token, self._tokenizer, self._vocab_size)
            raise UserError(f"{text.name}: its token {reason}; leave it out of the text", param=text.param)
        if len(ids) <= self._limit:
            return ids, is_cut
        self._refuse_long(text, str(len(ids)))
        return read(self._shortened), True

    def _read_of(self, text: Text, document: str) -> Callable[[PoolingInfo], list[int]]:
        if text.query is not None:
            query = text.query
            return lambda shape: pair_ids(self._tokenizer, shape, query, document)
        if self._kind == "embed":
            return lambda shape: embedded_ids(self._tokenizer, shape, document, is_query=text.is_query)
        return lambda shape: classified_ids(self._tokenizer, shape, document)

    def _document(self, text: Text) -> tuple[str, bool]:
        """The text, no longer than can matter, and whether the request's own limit for documents cut it."""
        document, most = text.text, self._cut.max_document_tokens
        if self._cut.cuts:
            document = self._tokenizer.beginning(document, self._limit)
        if most is not None and len(document) > most:  # a token is a character or more, but for odd characters
            tokens = self._tokenizer.encode_with_offsets(document, add_special_tokens=False)
            if len(tokens) > most:
                return document[: tokens[most - 1][3]], True
        return document, False

    def _refuse_long(self, text: Text, num: str) -> None:
        """Unless it may be cut. Raises `UserError`."""
        if self._cut.cuts:
            return
        raise UserError(
            f"{text.name} has {num} tokens; at most {self._limit} are possible: shorten it, or have it cut "
            "(truncate_prompt_tokens: -1, truncate: true)",
            param=text.param,
            code="context_length_exceeded",
        )

    def _checked(self, text: Text) -> list[int]:
        ids = text.token_ids or []
        bad = next((token for token in ids if not 0 <= token < self._vocab_size), None)
        if bad is not None:
            raise UserError(
                f"{text.name}: token id {bad} is outside 0..{self._vocab_size - 1}; send text, or ids of this model's "
                "own tokenizer",
                param=text.param,
            )
        return ids


def _too_much(param: str, num: int) -> UserError:
    return UserError(
        f"{param}: {num} tokens or more in all; at most {MAX_TOKENS} are allowed in a request: send several",
        param=param,
        code="too_many_tokens",
    )
