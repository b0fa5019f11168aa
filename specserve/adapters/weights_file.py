"""A safetensors file, mapped: what its header says of each tensor, held against the file, and the tensors' bytes.

The library's own reader takes four calls for each tensor, and an adapter has hundreds of a few KB. Here the bytes of
tensors of one shape are joined before torch sees them. Invariant: tensors lie one behind the other, from the first byte
behind the header to the last of the file, as the format demands.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
import numpy as np
import torch
from msgspec import Meta

from ..errors import shortened

MAX_HEADER_BYTES = 100 << 20  # the format's own limit
_LENGTH_BYTES = 8
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip


class WeightsFileError(ValueError):
    """This is no such file, and why."""

    def __init__(self, message: str):
        super().__init__(shortened(message))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file
    end: int


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[Annotated[int, Meta(ge=0)]]
    data_offsets: tuple[int, int]


def read_header(file: BinaryIO) -> dict[str, StoredTensor]:
    """The tensors of a file that stands at its start, by name, in their order there. Raises `WeightsFileError`."""
    size = os.fstat(file.fileno()).st_size
    header_len = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if header_len > min(size - _LENGTH_BYTES, MAX_HEADER_BYTES):
        raise WeightsFileError(f"a header of {header_len} bytes in a file of {size}")
    try:
        entries = msgspec.json.decode(file.read(header_len), type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        tensors, begin = {}, _LENGTH_BYTES + header_len
        for name, raw in entries.items():
            entry = msgspec.json.decode(raw, type=_Entry)
            dtype = _DTYPES.get(entry.dtype)
            if dtype is None:
                raise WeightsFileError(f"tensor {name[:200]!r} has dtype {entry.dtype[:80]!r}, which is not known here")
            start, end = entry.data_offsets
            tensors[name] = StoredTensor(dtype, tuple(entry.shape), begin + start, begin + end)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsFileError(f"its header: {error}") from None
    at = begin
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != at or stored.end != at + math.prod(stored.shape) * stored.dtype.itemsize:
            raise WeightsFileError(
                f"tensor {name[:200]!r} at {stored.start - begin} to {stored.end - begin} of the data is not where one "
                "of its shape lies behind the others"
            )
        at = stored.end
    if at != size:
        raise WeightsFileError(f"its tensors end at {at} of {size} bytes")
    return tensors


class WeightsFile:
    """A file that nobody writes to; what `tensor` gives keeps the mapping."""

    def __init__(self, path: Path):
        """Raises `WeightsFileError`, and `OSError`."""
        with open(path, "rb") as file:
            self.tensors = read_header(file)
            self._bytes = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor itself, in the mapping where it lies there as its dtype asks for."""
        data = self._bytes[stored.start : stored.end]
        if stored.start % stored.dtype.itemsize:
            data = data.copy()
        return torch.from_numpy(data).view(stored.dtype).view(stored.shape)

    def together(self, tensors: Sequence[StoredTensor]) -> torch.Tensor:
        """A copy of tensors of one dtype and shape, as [len(tensors), *shape]."""
        joined = np.concatenate([self._bytes[stored.start : stored.end] for stored in tensors])
        return torch.from_numpy(joined).view(tensors[0].dtype).view(len(tensors), *tensors[0].shape)
