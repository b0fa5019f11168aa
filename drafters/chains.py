"""Chains of guesses that heads made on a device, and the source that speaks them.

`ChainTable` holds them as arrays, a row for each sequence whose head may draft there, so that a step's chains are
written at once and native code reads them. A `ChainSource` stands in for `HeadSource`: its guesses were made each from
the one before. Invariant: it speaks only while the draft is its own chain.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np

from .head_files import LookaheadHeadFile
from .head_source import NUM_LEVELS
from .protocol import Guess

NOBODY = 0  # a row that is no sequence's, and never wanted
_FIRST_ROWS = 64


class ChainTable:
    """Rows of chains, made more when there are not enough.

    `tokens` [R, K] int32, -1 behind a chain's end; `probabilities` [R, K] float32; `lens` [R] int64: tokens of the
    sequence that the chain continues; `wanted` [R] bool: a draft began since whoever makes chains has looked, so the
    next may be worth its time; `owners` [R] int64: another number for each source that a row had. K is the longest
    chain.
    """

    def __init__(self, max_len: int):
        self.tokens = np.full((_FIRST_ROWS, max_len), -1, np.int32)
        self.probabilities = np.zeros((_FIRST_ROWS, max_len), np.float32)
        self.lens = np.full(_FIRST_ROWS, -1, np.int64)
        self.wanted = np.zeros(_FIRST_ROWS, np.bool_)
        self.owners = np.zeros(_FIRST_ROWS, np.int64)
        self.row_of: dict[str, int] = {}  # by request id
        self.heads: list[LookaheadHeadFile | None] = [None] * _FIRST_ROWS  # by row
        self._free = list(range(_FIRST_ROWS))[:NOBODY:-1]

    def source(self, request_id: str, head: LookaheadHeadFile) -> ChainSource:
        """A sequence's source, and the row that is its own for as long as the source is held."""
        if not self._free:
            self._add_rows()
        row = self.row_of[request_id] = self._free.pop()
        self.heads[row] = head
        self.owners[row] += 1
        source = ChainSource(self, row)
        weakref.finalize(source, self._release, request_id, row)
        return source

    def set(self, rows: np.ndarray, tokens: np.ndarray, probabilities: np.ndarray, lens: np.ndarray) -> None:
        """Chains [S, up to K] of `rows` [S], which continue so many tokens; -1 or no probability ends one."""
        num = tokens.shape[1]
        self.tokens[rows, :num], self.tokens[rows, num:] = tokens, -1
        self.probabilities[rows, :num] = probabilities
        self.lens[rows] = lens

    def _release(self, request_id: str, row: int) -> None:
        if self.row_of.get(request_id) == row:
            del self.row_of[request_id]
        self.heads[row], self.lens[row], self.wanted[row] = None, -1, False
        self.owners[row] += 1
        self._free.append(row)

    def _add_rows(self) -> None:
        num = len(self.heads)
        for name, fill in (("tokens", -1), ("probabilities", 0.0), ("lens", -1), ("wanted", False), ("owners", 0)):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.full_like(old, fill)]))
        self.heads += [None] * num
        self._free += range(2 * num - 1, num - 1, -1)


class ChainSource:
    """One sequence's chain, `table`'s row `row`."""

    source = "head"
    prior = tuple((level + 0.5) / NUM_LEVELS for level in range(NUM_LEVELS))

    def __init__(self, table: ChainTable, row: int):
        self.table, self.row = table, row
        self._chain: list[Guess] = []
        self._next = 0  # place in the chain; behind it when the draft has left it

    def begin(self, tokens: Sequence[int]) -> None:
        table, row = self.table, self.row
        table.wanted[row] = True
        self._chain, self._next = [], 0
        if table.lens[row] != len(tokens):
            return
        for token, chance in zip(table.tokens[row].tolist(), table.probabilities[row].tolist(), strict=True):
            if token < 0 or not 0.0 <= chance <= 1.0:
                break
            self._chain.append(Guess(token, min(NUM_LEVELS - 1, int(chance * NUM_LEVELS))))

    def peek(self) -> Guess | None:
        return self._chain[self._next] if self._next < len(self._chain) else None

    def follow(self, token: int) -> None:
        guess = self.peek()
        self._next = self._next + 1 if guess is not None and guess.token == token else len(self._chain)
