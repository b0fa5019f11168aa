"""Finds where a task's earlier completions met the newest tokens before: the suffix table over one adapter's outputs.

`TaskHistory` is immutable and shared by all sequences of a task; a `HistoryCursor` follows one sequence through it, and
`LearningHistory` replaces the shared table as completions are served. A match never reaches across the end of a
completion, a table never holds more than its `max_tokens`, and a file is either read whole or refused.
"""

from __future__ import annotations

import logging
import os
import struct
import threading
import zlib
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..whole_files import replace_file

logger = logging.getLogger(__name__)

MAX_CONTEXT = 24  # tokens of context that are sorted and compared; more says little about the continuation
MAX_CANDIDATES = 64  # newest occurrences that vote
MAX_TRAINED_TOKENS = 1_000_000  # of completions that a training run keeps; its default is less than half
MAX_FILE_TOKENS = 2 * MAX_TRAINED_TOKENS  # with their separators, of which short completions have as many as tokens
MAX_TOKEN_ID = 2**31 - 1
SEPARATOR = 0  # local id that ends every completion; local id k > 0 is the k-th smallest token id of the text

_MAGIC = b"SPECHIST"
_VERSION = 1
_HEADER = struct.Struct("<8sIIIII")  # magic, version, number of ids, length of the text, bytes of body, CRC-32 of body
_PARTITION_LIMIT = 4096  # wider ranges are searched from the newest position back, which ends early

Completion = Sequence[int] | np.ndarray


class HistoryError(ValueError):
    """A history file that cannot be used, and why."""


class _Packed(NamedTuple):
    """Completions as local ids, oldest first: what a file holds and what a table is built from."""

    ids: np.ndarray  # uint32, strictly increasing token ids
    text: np.ndarray  # uint16 or uint32 local ids, SEPARATOR after every completion

    @classmethod
    def of(cls, completions: Iterable[Completion]) -> _Packed:
        arrays = [_as_array(completion) for completion in completions]
        end = np.array([-1], dtype=np.int32)
        joined = np.concatenate([part for array in arrays if len(array) for part in (array, end)] or [end[:0]])
        unique, local = np.unique(joined, return_inverse=True)
        if len(unique):  # the first one is the separator, so the local ids come out right
            unique = unique[1:]
        return cls(unique.astype(np.uint32), local.astype(_text_dtype(len(unique))))

    def completions(self) -> list[np.ndarray]:
        ends = np.flatnonzero(self.text == SEPARATOR)
        tokens = np.concatenate([np.zeros(1, np.int32), self.ids.astype(np.int32)])[self.text]
        return [tokens[start:end] for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=False)]

    def write(self, path: Path) -> None:
        little = self.text.dtype.newbyteorder("<")
        body = zlib.compress(self.ids.astype("<u4").tobytes() + self.text.astype(little).tobytes(), 6)
        header = _HEADER.pack(_MAGIC, _VERSION, len(self.ids), len(self.text), len(body), zlib.crc32(body))

        def save(temporary: Path) -> None:
            # What was served to a tenant is nobody else's to read.
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(header + body)

        replace_file(path, save, sync=True)

    @classmethod
    def parse(cls, data: bytes, vocab_size: int) -> _Packed:
        header, body = data[: _HEADER.size], data[_HEADER.size :]
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise HistoryError("not a task history file")
        _, version, num_ids, text_len, body_len, checksum = _HEADER.unpack(header)
        if version != _VERSION:
            raise HistoryError(f"task history version {version}, this build reads version {_VERSION}")
        if text_len > MAX_FILE_TOKENS:
            raise HistoryError(
                f"the header claims {text_len} tokens and ends of completions, of which at most {MAX_FILE_TOKENS} are "
                f"read; train it with history.max_tokens of {MAX_TRAINED_TOKENS} or less"
            )
        if num_ids > text_len:
            raise HistoryError(f"the header claims {text_len} tokens of {num_ids} kinds")
        if len(body) != body_len:
            raise HistoryError(f"{len(data)} bytes, the header says {_HEADER.size + body_len}")
        if zlib.crc32(body) != checksum:
            raise HistoryError("the checksum does not match, the file is damaged")
        dtype = np.dtype(_text_dtype(num_ids)).newbyteorder("<")
        expected = 4 * num_ids + dtype.itemsize * text_len
        try:
            raw = zlib.decompressobj().decompress(body, expected + 1)  # never inflates beyond what the header allows
        except zlib.error as error:
            raise HistoryError(f"the body cannot be decompressed: {error}") from None
        if len(raw) != expected:
            raise HistoryError(f"the body does not hold the {expected} bytes its header promises")
        ids = np.frombuffer(raw, "<u4", num_ids).astype(np.uint32)
        text = np.frombuffer(raw, dtype, text_len, 4 * num_ids).astype(_text_dtype(num_ids))
        if num_ids and not bool((ids[1:] > ids[:-1]).all()):
            raise HistoryError("the token ids are not in order")
        if num_ids and int(ids[-1]) >= min(vocab_size, MAX_TOKEN_ID + 1):
            raise HistoryError(f"token id {ids[-1]} is outside the vocabulary of {vocab_size}")
        if text_len and int(text.max()) > num_ids:
            raise HistoryError("the text names a token id that the file does not list")
        ends = np.concatenate([[True], text == SEPARATOR])
        if not ends[-1] or bool((ends[1:] & ends[:-1]).any()):
            raise HistoryError("the completions are not separated as they should be")
        return cls(ids, text)


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

    def __init__(self, packed: _Packed) -> None:
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
        return cls(_Packed.of(_newest(completions, max_tokens)))

    @classmethod
    def load(cls, path: str | Path, vocab_size: int) -> TaskHistory:
        """Read what `save` wrote; HistoryError when it is damaged or names tokens outside the vocabulary."""
        return cls.parse(Path(path).read_bytes(), vocab_size)

    @classmethod
    def parse(cls, data: bytes, vocab_size: int) -> TaskHistory:
        """The history in a file's bytes; HistoryError as `load`."""
        return cls(_Packed.parse(data, vocab_size))

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


class LearningHistory:
    """The history of one adapter and tenant, growing with what is served.

    The table holds the newest served completions and fills what they leave of `max_tokens` with the newest of `base`.
    Only served completions are saved: base comes with the adapter. At most one rebuild runs at a time.
    """

    def __init__(
        self,
        base: TaskHistory | None,
        max_tokens: int = 200_000,
        rebuild_every: int = 4096,
        path: Path | None = None,
        *,
        vocab_size: int = MAX_TOKEN_ID + 1,
    ) -> None:
        self._base = base.completions() if base is not None else []
        self._max_tokens = max_tokens
        self._rebuild_every = rebuild_every
        self._path = path
        self._lock = threading.Lock()  # the served completions and the counts below; never held while building
        self._rebuild_lock = threading.Lock()  # taken before _lock
        self._served: deque[np.ndarray] = deque()
        self._num_served = 0
        self._num_pending = 0
        self._worker_running = False
        if path is not None and path.exists():
            try:
                for completion in _Packed.parse(path.read_bytes(), vocab_size).completions():
                    self._append(completion)
            except (HistoryError, OSError) as error:
                logger.warning("task history not loaded, starting without it: %s: %s", path, error)
        self._current = TaskHistory.build([*self._base, *self._served], max_tokens)

    @property
    def current(self) -> TaskHistory:
        """The newest finished table."""
        return self._current

    def learn(self, completion: Completion) -> None:
        """Add a served completion; it is in `current` after the next rebuild. One beyond max_tokens is ignored."""
        array = _as_array(completion)
        with self._lock:
            if not self._append(array):
                return
            self._num_pending += len(array)
            if self._num_pending < self._rebuild_every or self._worker_running:
                return
            self._worker_running = True
        try:
            threading.Thread(target=self._work, name="task-history", daemon=True).start()
        except RuntimeError as error:  # no thread to be had; the tokens stay pending
            logger.warning("task history not rebuilt: %s", error)
            with self._lock:
                self._worker_running = False

    def flush(self) -> None:
        """Bring everything learned into `current` and save it where a path was given."""
        self._rebuild()
        if self._path is None:
            return
        with self._rebuild_lock:  # two flushes would share the temporary file
            with self._lock:
                served = list(self._served)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _Packed.of(served).write(self._path)

    def _append(self, array: np.ndarray) -> bool:
        if not 0 < len(array) <= self._max_tokens:
            return False
        self._served.append(array)
        self._num_served += len(array)
        while self._num_served > self._max_tokens:
            self._num_served -= len(self._served.popleft())
        return True

    def _rebuild(self) -> None:
        with self._rebuild_lock:
            with self._lock:
                if not self._num_pending:
                    return
                served = list(self._served)
                self._num_pending = 0
            self._current = TaskHistory.build([*self._base, *served], self._max_tokens)

    def _work(self) -> None:
        while True:
            try:
                self.flush()  # a process that is killed forgets only what came since the last rebuild
            except Exception:  # serving goes on with the table there is, and the next rebuild tries again
                logger.exception("task history rebuild failed")
            with self._lock:
                if self._num_pending < self._rebuild_every:
                    self._worker_running = False
                    return


def expected_bytes(path: Path) -> int:
    """Memory that reading the history in a file takes at most, by what its header says, which is more than it holds
    then; the file's size where that says nothing."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            header, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    except OSError:
        return 0
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        return size
    _, _, num_ids, text_len, _, _ = _HEADER.unpack(header)
    return (
        _peak_bytes(text_len, num_ids, np.dtype(_text_dtype(num_ids)).itemsize) if text_len <= MAX_FILE_TOKENS else size
    )


def _peak_bytes(text_len: int, num_ids: int, token_bytes: int) -> int:
    """While a table is made: every position's context beside the others, to be sorted."""
    return text_len * (MAX_CONTEXT * token_bytes + 20) + num_ids * 200


def _held_bytes(text_len: int, num_ids: int, token_bytes: int) -> int:
    """Text both ways, order and rank of its positions; a list, a dictionary and bounds by token id."""
    return text_len * (2 * token_bytes + 8) + num_ids * 200


def _text_dtype(num_ids: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if num_ids < 65535 else np.uint32  # 65535 itself stays free: see match


def _as_array(completion: Completion) -> np.ndarray:
    array = np.array(completion, dtype=np.int64)
    if len(array) and (int(array.min()) < 0 or int(array.max()) > MAX_TOKEN_ID):
        raise ValueError(f"a completion holds a token id outside 0..{MAX_TOKEN_ID}")
    return array.astype(np.int32)


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
