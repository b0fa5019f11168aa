"""Finds where a task's earlier completions met the newest tokens before: the suffix table over one adapter's outputs.

`TaskHistory` is immutable and shared by all sequences of a task, and a `HistoryCursor` follows one sequence through it.
A match never reaches across the end of a completion, and a table never holds more than its `max_tokens`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .history_file import SEPARATOR, Completion, PackedHistory, read_counts, text_dtype

MAX_CONTEXT = 24  # tokens of context that are sorted and compared; more says little about the continuation
MAX_CANDIDATES = 64  # newest occurrences that vote
_PARTITION_LIMIT = 4096  # wider ranges are searched from the newest position back, which ends early


class HistoryArrays(NamedTuple):
    """What native code reads of a table, which goes on holding it."""

    reversed: np.ndarray  # bytes
    sorted: np.ndarray  # int32
    rank: np.ndarray  # int32
    text: np.ndarray  # uint16 or uint32
    ids: np.ndarray  # uint32
    bounds: np.ndarray  # int32
    starts: np.ndarray  # int32


class TaskHistory:
    """Every position of a task's completions, sorted by the tokens before it read backwards."""

    def __init__(self, packed: PackedHistory) -> None:
        self._packed = packed
        text = packed.text
        self._token_bytes = text.dtype.itemsize
        self._key_bytes = MAX_CONTEXT * self._token_bytes
        big = text.dtype.newbyteorder(">")
        # The text backwards and big-endian: a position's context is a slice of it, and memcmp orders slices as tokens.
        # Slices run past separators, which only orders contexts that already differ from every query there.
        self._reversed = np.concatenate([text[::-1], np.zeros(MAX_CONTEXT, text.dtype)]).astype(big).tobytes()
        self._origin = len(text) * self._token_bytes
        positions = np.flatnonzero(text != SEPARATOR).astype(np.int32)
        keys = np.ndarray(
            (len(text) + 1,), f"S{self._key_bytes}", self._reversed, strides=(self._token_bytes,)
        )  # overlapping views, one for each context
        order = np.argsort(keys[len(text) - positions], kind="stable")
        self._sorted = positions[order]
        self._rank = np.full(len(text), -1, np.int32)  # place in _sorted, by position; separators have none
        self._rank[self._sorted] = np.arange(len(positions), dtype=np.int32)
        # memoryviews yield Python ints, several times faster than numpy scalars
        self._sorted_view = self._sorted.data
        text = np.ascontiguousarray(text)
        self._text_view = text.data
        self._global: list[int | None] = [None, *packed.ids.tolist()]
        self._local = {token: local for local, token in enumerate(packed.ids.tolist(), 1)}
        before = np.concatenate([np.zeros(1, text.dtype), text[:-1]])[: len(text)]
        # Where, in the order of contexts, those begin that end with each local id.
        bounds = np.searchsorted(before[self._sorted], np.arange(len(packed.ids) + 2)).astype(np.int32)
        starts = np.flatnonzero(before == SEPARATOR)[-MAX_CANDIDATES:][::-1].astype(np.int32)
        self._bounds: list[int] = bounds.tolist()
        self._starts: list[int] = starts.tolist()
        self.arrays = HistoryArrays(
            np.frombuffer(self._reversed, np.uint8), self._sorted, self._rank, text, packed.ids, bounds, starts
        )

    @classmethod
    def build(cls, completions: Sequence[Completion], max_tokens: int) -> TaskHistory:
        """Of `completions`, oldest first, the newest that together have at most `max_tokens` tokens.

        A completion that alone is longer is skipped, so that one runaway output does not empty the table.
        """
        return cls(PackedHistory.of(_newest(completions, max_tokens)))

    @classmethod
    def load(cls, path: str | Path, vocab_size: int) -> TaskHistory:
        """Read what `save` wrote; HistoryError when it is damaged or names tokens outside the vocabulary."""
        return cls.parse(Path(path).read_bytes(), vocab_size)

    @classmethod
    def parse(cls, data: bytes, vocab_size: int) -> TaskHistory:
        """The history in a file's bytes; HistoryError as `load`."""
        return cls(PackedHistory.parse(data, vocab_size))

    def save(self, path: str | Path) -> None:
        """Replace `path` in one step; the sorted positions are not stored."""
        self._packed.write(Path(path))

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about."""
        return _held_bytes(len(self._rank), len(self._packed.ids), self._token_bytes)

    @property
    def num_tokens(self) -> int:
        """Tokens held, separators not counted."""
        return len(self._sorted)

    @property
    def starts(self) -> list[int]:
        """First positions of the newest completions, newest first."""
        return self._starts

    def completions(self) -> list[np.ndarray]:
        """The completions held, oldest first."""
        return self._packed.completions()

    def token_at(self, position: int) -> int | None:
        """The token at `position`, None where a completion ends."""
        return self._global[self._text_view[position]]

    def votes(self, positions: Sequence[int]) -> tuple[int, int] | None:
        """The token that most of `positions` have, the first one's of equals, and how many: (token, votes).

        None of them is the end of a completion.
        """
        if not positions:
            return None
        cast = list(map(self._text_view.__getitem__, positions))
        winner, num_votes = cast[0], cast.count(cast[0])
        if 2 * num_votes < len(cast):  # else nobody has more, and the first came first
            counts = Counter(cast)
            winner = max(counts, key=counts.__getitem__)
            num_votes = counts[winner]
        token = self._global[winner]
        assert token is not None
        return token, num_votes

    def going_on(self, positions: Sequence[int], token: int) -> list[int]:
        """The positions after those of `positions` that have `token` and are not their completion's last."""
        local, text = self._local.get(token), self._text_view
        if local is None:
            return []
        return [at + 1 for at in positions if text[at] == local and text[at + 1] != SEPARATOR]

    def match(self, context: Sequence[int]) -> tuple[list[int], int] | None:
        """Where the end of `context` occurred, agreeing as far back as anything does: (continuations, match length).

        At most MAX_CANDIDATES positions, the newest ones, newest first; the length counts up to MAX_CONTEXT tokens.
        """
        width = self._token_bytes
        query = bytearray()
        for token in reversed(context[-MAX_CONTEXT:]):
            local = self._local.get(token)
            if local is None:
                break
            query += local.to_bytes(width, "big")
        if not query:
            return None
        newest = int.from_bytes(query[:width], "big")
        low, high = self._bounds[newest], self._bounds[newest + 1]
        if low == high:
            return None
        positions, key = self._sorted_view, self._key
        place = bisect_left(positions, bytes(query), low, high, key=key)
        length = max(
            _common_tokens(key(positions[neighbour]), query, width)
            for neighbour in (place - 1, place)
            if low <= neighbour < high
        )
        if length > 1:
            prefix = bytes(query[: length * width])
            low = bisect_left(positions, prefix, low, place, key=key)
            # No local id is all ones, so this sorts right after every context that starts with the prefix.
            high = bisect_left(positions, prefix + b"\xff" * width, place, high, key=key)
        return self._newest_in(low, high), length

    def _key(self, position: int) -> bytes:
        start = self._origin - position * self._token_bytes
        return self._reversed[start : start + self._key_bytes]

    def _newest_in(self, low: int, high: int) -> list[int]:
        """The largest positions among the sorted places low..high-1, largest first."""
        if high - low <= _PARTITION_LIMIT:
            found = self._sorted[low:high]
            if len(found) > MAX_CANDIDATES:
                found = np.partition(found, len(found) - MAX_CANDIDATES)[-MAX_CANDIDATES:]
            return sorted(found.tolist(), reverse=True)
        end, chunk = len(self._rank), _PARTITION_LIMIT
        newest: list[int] = []
        while end > 0 and len(newest) < MAX_CANDIDATES:
            start = max(0, end - chunk)
            ranks = self._rank[start:end]
            hits = np.flatnonzero((ranks >= low) & (ranks < high))[-(MAX_CANDIDATES - len(newest)) :]
            newest.extend((hits[::-1] + start).tolist())
            end, chunk = start, 2 * chunk
        return newest


class HistoryCursor:
    """Follows one sequence's output through a history: the occurrences that still agree with it."""

    def __init__(self, history: TaskHistory) -> None:
        self._history = history
        self._recent: list[int] = []  # the newest tokens of the output; MAX_CONTEXT of them are enough to match again
        self._candidates: list[int] = []  # newest first
        self._match_len = 0

    def begin(self, output: Sequence[int]) -> None:
        """Stand at the end of `output`; an empty one stands at the starts of the completions."""
        self._recent = list(output[-MAX_CONTEXT:])
        if self._recent:
            self._match_again()
        else:
            self._candidates, self._match_len = self._history.starts, 0

    def peek(self) -> tuple[int, int, int, int] | None:
        """What most candidates continue with, the newest one's on a tie: (token, match length, votes, candidates)."""
        best = self._history.votes(self._candidates)  # a candidate whose completion has ended is dropped by follow
        return (best[0], self._match_len, best[1], len(self._candidates)) if best is not None else None

    def follow(self, token: int) -> None:
        """The output went on with `token`: advance the candidates that agree, or match again when none is left."""
        self._recent.append(token)
        if len(self._recent) > 4 * MAX_CONTEXT:
            del self._recent[:-MAX_CONTEXT]
        self._candidates = self._history.going_on(self._candidates, token)
        self._match_len += 1
        if not self._candidates:
            self._match_again()

    def _match_again(self) -> None:
        self._candidates, self._match_len = self._history.match(self._recent) or ([], 0)


def expected_bytes(path: Path) -> int:
    """Memory that reading the history in a file takes at most, by what its header says, which is more than it holds
    then; the file's size where that says nothing."""
    try:
        size, counts = read_counts(path)
    except OSError:
        return 0
    if counts is None:
        return size
    num_ids, text_len = counts
    return _peak_bytes(text_len, num_ids, np.dtype(text_dtype(num_ids)).itemsize)


def _peak_bytes(text_len: int, num_ids: int, token_bytes: int) -> int:
    """While a table is made: every position's context beside the others, to be sorted."""
    return text_len * (MAX_CONTEXT * token_bytes + 20) + num_ids * 200


def _held_bytes(text_len: int, num_ids: int, token_bytes: int) -> int:
    """Text both ways, order and rank of its positions; a list, a dictionary and bounds by token id."""
    return text_len * (2 * token_bytes + 8) + num_ids * 200


def _newest(completions: Sequence[Completion], max_tokens: int) -> list[Completion]:
    kept: list[Completion] = []
    left = max_tokens
    for completion in reversed(completions):
        if len(completion) > max_tokens:
            continue
        if len(completion) > left:
            break
        left -= len(completion)
        if len(completion):
            kept.append(completion)
    return kept[::-1]


def _common_tokens(key: bytes, query: bytearray, width: int) -> int:
    length = 0
    while length < len(query) and key[length : length + width] == query[length : length + width]:
        length += width
    return length // width
