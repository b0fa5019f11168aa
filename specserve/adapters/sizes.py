"""How many bytes an adapter will take in memory, from the headers of its files, before any of it is read.

An upper bound for every layout that a path may hold it in, and for what its history takes while it is read, so that
what is reserved suffices. Says nothing of whether the adapter can be served: what cannot be understood counts as its
files' size, and is refused when it is read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from ..adapter_files import HEAD_WEIGHTS_FILE, HISTORY_FILE, WEIGHTS_FILE
from ..drafters.head_files import VOCAB_STEP
from ..drafters.task_history import expected_bytes as history_bytes
from ..model.shapes import JOINED
from .pooling_config import SCORE
from .weights_file import WeightsFileError, read_header

_RANK_STEP, _IN_STEP, _OUT_STEP = 8, 32, 64  # values that layouts round up to
_ALIGNMENT = 64  # bytes


def expected_bytes(directory: Path, lora_itemsize: int) -> int:
    """Bytes that LoRA (`lora_itemsize` a value), score, lookahead head and history in `directory` take at most."""
    lora, num_bytes = _shapes(directory / WEIGHTS_FILE)
    for key, shape in lora.items():
        if "lora_" in key and len(shape) == 2:
            is_a = key.removesuffix(".weight").endswith("_A")
            parts = next((len(modules) for name, modules in JOINED.items() if f".{name}." in key), 1)
            if is_a:  # each of joined linears has it
                num_bytes += parts * layout_bytes(shape, (0, 0), lora_itemsize)
            else:
                num_bytes += layout_bytes((0, 0), (shape[0] + (parts - 1) * _OUT_STEP, shape[1]), lora_itemsize)
    num_bytes += 4 * math.prod(lora.get(SCORE, (0,)))  # in fp32
    head, head_bytes = _shapes(directory / HEAD_WEIGHTS_FILE)
    num_bytes += head_bytes + sum(4 * math.prod(shape) for shape in head.values())  # in fp32
    if len(embed := head.get("embed", ())) == 2:  # padded, and a dictionary of its tokens
        num_bytes += 4 * VOCAB_STEP * (embed[1] + 1) + 128 * embed[0]
    return num_bytes + history_bytes(directory / HISTORY_FILE)


def layout_bytes(a_shape: Sequence[int], b_shape: Sequence[int], itemsize: int) -> int:
    """Bytes that a module's A [R, in] and B [out, R] take at most, in whatever layout; either may be empty."""
    (rank, size_in), (size_out, rank_of_b) = a_shape, b_shape
    a = rank * _round_up(size_in, _IN_STEP) * itemsize
    b = _round_up(size_out, _OUT_STEP) * _round_up(rank_of_b, _RANK_STEP) * itemsize
    return _round_up(a, _ALIGNMENT) + _round_up(b, _ALIGNMENT)


def _shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """The tensors' shapes by name, and 0; or none, and the file's size, where it is no safetensors file."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            try:
                return {name: stored.shape for name, stored in read_header(file).items()}, 0
            except WeightsFileError:
                return {}, os.fstat(file.fileno()).st_size
    except OSError:
        return {}, 0


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
