"""Which files hold a model directory's weights, where each tensor lies in them, and the rows of one, piece by piece.

Nothing is read through a mapping: pages of a mapped file stay resident until all of it is dropped, which held a model
twice while it was loaded, and a mapped file that somebody truncates would end the process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import ModelError
from .shapes import text_name

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by their names in safetensors
MAX_NAMED = 5  # tensors named in one message
MAX_HEADER_BYTES = 100_000_000  # as safetensors has it


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in its file; `dtype` is what safetensors calls it."""

    file: Path
    offset: int  # in bytes
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """All of it, in memory of its own. Raises `ModelError`."""
        tensor = torch.empty(self.shape, dtype=STORED[self.dtype])
        data = tensor.view(-1).view(torch.uint8).numpy()
        with open(self.file, "rb") as stream:
            stream.seek(self.offset)
            _fill(data, stream, self.file)
        return tensor

    def rows(self, rows: slice) -> StoredTensor:
        """Some of its rows."""
        row_bytes = math.prod(self.shape[1:]) * STORED[self.dtype].itemsize
        offset, shape = self.offset + rows.start * row_bytes, (rows.stop - rows.start, *self.shape[1:])
        return StoredTensor(self.file, offset, self.dtype, shape)


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by their names in a language model, from its header. Raises `ModelError`."""
    try:
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise ValueError(f"its header of {size} bytes is larger than {MAX_HEADER_BYTES}")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        return {
            text_name(name): StoredTensor(
                file, 8 + size + entry["data_offsets"][0], entry["dtype"], tuple(entry["shape"])
            )
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is not readable as safetensors: {error}") from None


def _fill(data: Any, stream: IO[bytes], file: Path) -> None:
    if stream.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise ModelError(f"{file} ends within its tensors; download it again")


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Where a matrix [rows, columns] of dtype `dtype` lies in its file."""

    file: Path
    offset: int  # in bytes
    dtype: torch.dtype
    shape: tuple[int, int]

    @classmethod
    def find(cls, model_dir: Path, name: str) -> StoredRows:
        """The matrix by its name on the hub. Raises `ModelError`."""
        for file in weight_files(model_dir):
            tensor = stored_tensors(file).get(name)
            if tensor is not None:
                if len(tensor.shape) != 2 or tensor.dtype not in STORED:
                    raise ModelError(f"{file}: {name} is {tensor.dtype} {list(tensor.shape)}, no matrix of floats")
                rows, columns = tensor.shape
                return cls(file, tensor.offset, STORED[tensor.dtype], (rows, columns))
        raise ModelError(f"{model_dir} has no tensor {name}")

    def pieces(self, num_rows: int) -> Iterator[torch.Tensor]:
        """All rows in order, at most `num_rows` at a time. Raises `ModelError`."""
        columns = self.shape[1]
        with open(self.file, "rb") as stream:
            stream.seek(self.offset)
            for start in range(0, self.shape[0], num_rows):
                rows = min(num_rows, self.shape[0] - start)
                data = bytearray(rows * columns * self.dtype.itemsize)
                _fill(data, stream, self.file)
                yield torch.frombuffer(data, dtype=self.dtype).view(rows, columns)


def weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            files = [path / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a safetensors index: {error}") from None
        missing = [file.name for file in files if not file.is_file() or file.parent != path]
        if missing:
            raise ModelError(f"{path} lacks {', '.join(missing[:MAX_NAMED])}, which its index names")
        return files
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    found = sorted(file.name for file in path.glob("*.bin"))
    hint = f"; {found[0]} is a pickle and is never loaded: save with safe_serialization=True" if found else ""
    raise ModelError(f"{path} has no model.safetensors{hint}")
