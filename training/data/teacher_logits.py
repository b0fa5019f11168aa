"""A teacher's most likely tokens at every token of the answers of a rows file, in one safetensors file beside it.

`rows.logits.safetensors` belongs to `rows.jsonl` byte for byte: it names the digest of the rows and the fingerprint of
the tokenizer that its ids are of, and is refused where either differs. Owns the format; knows no model.

The file holds `offsets` int64 [rows + 1], `ids` int32 [tokens, K] and `logprobs` float16 [tokens, K]: row i's are those
from offsets[i] to offsets[i + 1], one for each token of its answers in order, their end tokens included. A position
with fewer than K known tokens is filled with the id -1. What the K leave of the probability is any other token's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...errors import UserError
from ...file_hash import file_hash
from ...whole_files import replace_file

FORMAT_VERSION = "1"
_SHAPES = {"offsets": ("I64", 1), "ids": ("I32", 2), "logprobs": ("F16", 2)}


@dataclass(frozen=True, slots=True)
class TopLogits:
    """Of n consecutive tokens of an answer: ids int32 [n, K], -1 where fewer are known, and logprobs float16 [n, K]."""

    ids: np.ndarray
    logprobs: np.ndarray

    def __len__(self) -> int:
        return self.ids.shape[0]


def logits_file(rows_file: Path) -> Path:
    """Where the logits of a rows file lie."""
    return rows_file.with_suffix(".logits.safetensors")


def existing_logits(rows_file: Path) -> Path:
    """The logits of a rows file. Raises `UserError` where there are none."""
    path = logits_file(rows_file)
    if not path.is_file():
        raise UserError(
            f"there are no teacher's logits beside {rows_file}: {path.name} is missing; make it with `specserve "
            "distill --top-logprobs K`, or name a teacher of the same tokenizer (--set teacher=DIR)",
            param="data.train",
        )
    return path


def write_teacher_logits(rows_file: Path, tokenizer_hash: str, rows: Sequence[TopLogits]) -> Path:
    """Write what a teacher says of each row of `rows_file`, which is complete; returns the file.

    tokenizer_hash: `tokenizer_fingerprint` of the model that trains. A row without logits has none of its tokens.
    """
    widths = {row.ids.shape[1] for row in rows if len(row)} or {1}
    if len(widths) != 1:
        raise UserError(f"the rows have {sorted(widths)} tokens a position; one number is wanted", param="logits")
    (num_top,) = widths
    lengths = [len(row) for row in rows]
    tensors: dict[str, np.ndarray] = {
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "ids": np.concatenate([np.zeros((0, num_top)), *(row.ids for row in rows if len(row))]).astype(np.int32),
        "logprobs": np.concatenate([np.zeros((0, num_top)), *(row.logprobs for row in rows if len(row))]).astype("f2"),
    }
    metadata = {
        "format_version": FORMAT_VERSION,
        "tokenizer_hash": tokenizer_hash,
        "num_top": str(num_top),
        "rows_sha256": file_hash(rows_file),
    }
    path = logits_file(rows_file)
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata), sync=True)
    return path


def read_teacher_logits(rows_file: Path, tokenizer_hash: str, vocab_size: int) -> list[TopLogits]:
    """What the teacher says of each row of `rows_file`, in order.

    Raises `UserError` where there is no such file, and for one that is damaged, of other rows or another tokenizer.
    """
    path = existing_logits(rows_file)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            _check_belongs(path, metadata, rows_file, tokenizer_hash)
            for name, (dtype, rank) in _SHAPES.items():
                found = file.get_slice(name)
                if found.get_dtype() != dtype or len(found.get_shape()) != rank:
                    raise _damaged(path, f"{name} is {found.get_dtype()} {found.get_shape()}")
            offsets, ids, logprobs = (file.get_tensor(name) for name in _SHAPES)
    except (SafetensorError, OSError) as error:
        raise _damaged(path, str(error)) from None
    _check_values(path, offsets, ids, logprobs, vocab_size)
    return [TopLogits(ids[start:stop], logprobs[start:stop]) for start, stop in zip(offsets, offsets[1:], strict=False)]


def _check_belongs(path: Path, metadata: dict[str, str], rows_file: Path, tokenizer_hash: str) -> None:
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version!r}, here {FORMAT_VERSION!r} is read; make it again")
    if metadata.get("tokenizer_hash") != tokenizer_hash:
        raise UserError(
            f"{path} holds the logits of a teacher with another tokenizer ({str(metadata.get('tokenizer_hash'))[:12]}, "
            f"here {tokenizer_hash[:12]}): the two name tokens differently; take a teacher of the student's family, or "
            "train on its answers alone (loss: ce)",
            param="loss",
        )
    if metadata.get("rows_sha256") != file_hash(rows_file):
        raise UserError(
            f"{rows_file} has changed since {path.name} was made; make the logits again, or put the old rows back",
            param="data.train",
        )


def _check_values(path: Path, offsets: np.ndarray, ids: np.ndarray, logprobs: np.ndarray, vocab_size: int) -> None:
    if ids.shape != logprobs.shape:
        raise _damaged(path, f"ids are {list(ids.shape)} and logprobs {list(logprobs.shape)}")
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(ids) or bool((np.diff(offsets) < 0).any()):
        raise _damaged(path, "its offsets are no ascending numbers from 0 to its tokens")
    if ids.size and (ids.min() < -1 or ids.max() >= vocab_size or ids.shape[1] >= vocab_size):
        raise _damaged(path, f"its ids are not all in the model's vocabulary of {vocab_size}")
    known = logprobs[ids >= 0]
    if bool(np.isnan(known).any()) or (known.size and float(known.max()) > 0):
        raise _damaged(path, "its logprobs are not all numbers of at most 0")


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is no file of teacher's logits: {reason}; make it again", param="data.train")
