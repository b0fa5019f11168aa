"""How many bytes an adapter will take in memory, from the headers of its files, before any of it is read.

An upper bound for every layout that a path may hold it in, so that what is reserved suffices. Says nothing of whether
the adapter can be served: what cannot be understood counts as its files' size, and is refused when it is read.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from ..adapter_files import HEAD_WEIGHTS_FILE, HISTORY_FILE, WEIGHTS_FILE
from ..drafters.head_files import VOCAB_STEP
from ..drafters.task_history import expected_bytes as history_bytes

MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit
_RANK_STEP, _SIZE_STEP, _ALIGNMENT = 8, 64, 64  # that layouts round up to: values, values, bytes


class _Tensor(msgspec.Struct):
    shape: list[int]


def expected_bytes(directory: Path, lora_itemsize: int) -> int:
    """Bytes that LoRA (`lora_itemsize` a value), lookahead head and task history in `directory` take at most."""
    num_bytes = 0
    for key, shape in _shapes(directory / WEIGHTS_FILE):
        if "lora_" in key and len(shape) == 2:
            num_bytes += layout_bytes(shape, lora_itemsize)
    for key, shape in _shapes(directory / HEAD_WEIGHTS_FILE):  # held in fp32
        num_bytes += 4 * math.prod(shape) + (4 * (VOCAB_STEP * (shape[-1] + 1) if key == "embed" and shape else 0))
        num_bytes += 128 * shape[0] if key == "embed" and shape else 0  # where each token is
    return num_bytes + history_bytes(directory / HISTORY_FILE)


def layout_bytes(shape: Sequence[int], itemsize: int) -> int:
    """Bytes that A or B of this shape takes at most, in whatever layout."""
    values = max(_round_up(a, _RANK_STEP) * _round_up(b, _SIZE_STEP) for a, b in (shape, shape[::-1]))  # rank first?
    return _round_up(values * itemsize, _ALIGNMENT)


def _shapes(path: Path) -> Iterator[tuple[str, list[int]]]:
    """(name, shape) of each tensor of a safetensors file; one without a name for what is none."""
    with contextlib.suppress(OSError):
        size = os.stat(path).st_size
        try:
            with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
                header_len = int.from_bytes(file.read(8), "little")
                if header_len > min(size, MAX_HEADER_BYTES):
                    raise ValueError
                header = msgspec.json.decode(file.read(header_len), type=dict[str, msgspec.Raw])
            tensors = ((name, raw) for name, raw in header.items() if name != "__metadata__")
            found = {name: msgspec.json.decode(raw, type=_Tensor).shape for name, raw in tensors}
            if sum(math.prod(shape) for shape in found.values()) > size:  # a value has a byte at least
                raise ValueError
            yield from found.items()
        except (ValueError, msgspec.MsgspecError):
            yield "", [size]


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
