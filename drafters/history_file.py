"""A task's completions as they lie in a file: packed, checksummed, read whole or refused.

Owns the format and its limits. The sorted positions of a table are not stored: `task_history` makes them.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..whole_files import replace_file

MAX_TRAINED_TOKENS = 1_000_000  # of completions that a training run keeps; its default is less than half
MAX_FILE_TOKENS = 2 * MAX_TRAINED_TOKENS  # with their separators, of which short completions have as many as tokens
MAX_TOKEN_ID = 2**31 - 1
SEPARATOR = 0  # local id that ends every completion; local id k > 0 is the k-th smallest token id of the text

_MAGIC = b"SPECHIST"
_VERSION = 1
_HEADER = struct.Struct("<8sIIIII")  # magic, version, number of ids, length of the text, bytes of body, CRC-32 of body

Completion = Sequence[int] | np.ndarray


class HistoryError(ValueError):
    """A history file that cannot be used, and why."""


class PackedHistory(NamedTuple):
    """Completions as local ids, oldest first: what a file holds and what a table is built from."""

    ids: np.ndarray  # uint32, strictly increasing token ids
    text: np.ndarray  # uint16 or uint32 local ids, SEPARATOR after every completion

    @classmethod
    def of(cls, completions: Iterable[Completion]) -> PackedHistory:
        arrays = [as_array(completion) for completion in completions]
        end = np.array([-1], dtype=np.int32)
        joined = np.concatenate([part for array in arrays if len(array) for part in (array, end)] or [end[:0]])
        unique, local = np.unique(joined, return_inverse=True)
        if len(unique):  # the first one is the separator, so the local ids come out right
            unique = unique[1:]
        return cls(unique.astype(np.uint32), local.astype(text_dtype(len(unique))))

    def completions(self) -> list[np.ndarray]:
        """Their token ids, oldest first."""
        ends = np.flatnonzero(self.text == SEPARATOR)
        tokens = np.concatenate([np.zeros(1, np.int32), self.ids.astype(np.int32)])[self.text]
        return [tokens[start:end] for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=False)]

    def write(self, path: Path) -> None:
        """Replace `path` in one step."""
        little = self.text.dtype.newbyteorder("<")
        body = zlib.compress(self.ids.astype("<u4").tobytes() + self.text.astype(little).tobytes(), 6)
        header = _HEADER.pack(_MAGIC, _VERSION, len(self.ids), len(self.text), len(body), zlib.crc32(body))

        def save(temporary: Path) -> None:
            # What was served to a tenant is nobody else's to read.
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(header + body)

        replace_file(path, save, sync=True)

    @classmethod
    def parse(cls, data: bytes, vocab_size: int) -> PackedHistory:
        """Of a file's bytes. Raises `HistoryError`, also for ids outside the vocabulary."""
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
        dtype = np.dtype(text_dtype(num_ids)).newbyteorder("<")
        expected = 4 * num_ids + dtype.itemsize * text_len
        try:
            raw = zlib.decompressobj().decompress(body, expected + 1)  # never inflates beyond what the header allows
        except zlib.error as error:
            raise HistoryError(f"the body cannot be decompressed: {error}") from None
        if len(raw) != expected:
            raise HistoryError(f"the body does not hold the {expected} bytes its header promises")
        ids = np.frombuffer(raw, "<u4", num_ids).astype(np.uint32)
        text = np.frombuffer(raw, dtype, text_len, 4 * num_ids).astype(text_dtype(num_ids))
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


def read_counts(path: Path) -> tuple[int, tuple[int, int] | None]:
    """The bytes of a file, and what its header says: how many token ids, and the length of the text.

    None of these where it says nothing, or more than is read. Raises `OSError`.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        header, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        return size, None
    _, _, num_ids, text_len, _, _ = _HEADER.unpack(header)
    return size, (num_ids, text_len) if text_len <= MAX_FILE_TOKENS else None


def text_dtype(num_ids: int) -> type[np.uint16] | type[np.uint32]:
    return np.uint16 if num_ids < 65535 else np.uint32  # 65535 itself stays free: see match


def as_array(completion: Completion) -> np.ndarray:
    array = np.array(completion, dtype=np.int64)
    if len(array) and (int(array.min()) < 0 or int(array.max()) > MAX_TOKEN_ID):
        raise ValueError(f"a completion holds a token id outside 0..{MAX_TOKEN_ID}")
    return array.astype(np.int32)
