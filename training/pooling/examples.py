"""Rows as token ids, each text exactly as the server reads it for the adapter (text/pooled_text.py)."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ...adapter_kinds import Question
from ...adapters.pooling_config import PoolingConfig
from ...errors import UserError
from ...text.known_tokens import check_known
from ...text.pooled_text import classified_ids, embedded_ids, pair_ids
from ...text.tokenizer import TextTokenizer
from .questions import Target, targets_of
from .rows import ClassifyRow, EmbedRow, PoolingRow, RerankRow

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EmbedExample:
    query: Tokens
    positive: Tokens
    negatives: tuple[Tokens, ...]
    line: int

    @property
    def texts(self) -> Iterator[Tokens]:
        yield from (self.query, self.positive, *self.negatives)

    @property
    def content(self) -> bytes:
        return _content(self.texts)


@dataclass(frozen=True, slots=True)
class RerankExample:
    pairs: tuple[Tokens, ...]  # of the query with each document
    scores: tuple[float, ...]
    line: int

    @property
    def texts(self) -> Iterator[Tokens]:
        yield from self.pairs

    @property
    def content(self) -> bytes:
        return _content(self.pairs) + array("d", self.scores).tobytes()


@dataclass(frozen=True, slots=True)
class ClassifyExample:
    tokens: Tokens
    targets: tuple[Target, ...]  # one for each question
    line: int

    @property
    def texts(self) -> Iterator[Tokens]:
        yield self.tokens

    @property
    def content(self) -> bytes:
        return _content(self.texts) + json.dumps(self.targets).encode()


PoolingExample = EmbedExample | RerankExample | ClassifyExample


class ExampleEncoder:
    """Examples of rows for an adapter that is described by `shape`; `file` is named in errors.

    vocab_size: the model's, where its tokenizer may know more tokens.
    """

    def __init__(self, tokenizer: TextTokenizer, shape: PoolingConfig, vocab_size: int | None = None):
        self._tokenizer, self._shape, self._vocab_size = tokenizer, shape, vocab_size

    def examples(self, rows: Iterable[PoolingRow], file: str, questions: Sequence[Question] = ()) -> list:
        """Of all `rows`, in order. Raises `UserError` for a row without a token, or with an unknown answer."""
        return [self._example(row, file, questions) for row in rows]

    def query(self, text: str) -> Tokens:
        return tuple(embedded_ids(self._tokenizer, self._shape, text, is_query=True))

    def document(self, text: str) -> Tokens:
        return tuple(embedded_ids(self._tokenizer, self._shape, text, is_query=False))

    def _example(self, row: PoolingRow, file: str, questions: Sequence[Question]) -> PoolingExample:
        example: PoolingExample
        if isinstance(row, EmbedRow):
            negatives = tuple(self.document(text) for text in row.negatives)
            example = EmbedExample(self.query(row.query), self.document(row.positive), negatives, row.line)
        elif isinstance(row, RerankRow):
            pairs = tuple(tuple(pair_ids(self._tokenizer, self._shape, row.query, text)) for text in row.documents)
            example = RerankExample(pairs, row.scores, row.line)
        else:
            assert isinstance(row, ClassifyRow)
            tokens = tuple(classified_ids(self._tokenizer, self._shape, row.text))
            example = ClassifyExample(tokens, targets_of(row, questions, file), row.line)
        if not all(example.texts):
            raise UserError(f"{file} line {row.line}: a text has no tokens", param="data")
        try:
            check_known(itertools.chain(*example.texts), self._tokenizer, self._vocab_size)
        except UserError as error:
            raise UserError(f"{file} line {row.line}: {error}", param=error.param) from None
        return example


def _content(texts: Iterable[Tokens]) -> bytes:
    """No two different lists of texts have the same."""
    return b"".join(len(text).to_bytes(8, "little") + array("q", text).tobytes() for text in texts)
