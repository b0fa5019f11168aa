"""Which files hold a model directory's weights, and the rows of one tensor, read piece by piece.

Rows are read without mapping the file, for what is looked at again while the model serves: a mapped file that somebody
truncates would end the process.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ModelError

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by their names in safetensors
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_NAMED = 5  # tensors named in one message
MAX_HEADER_BYTES = 100_000_000  # as safetensors has it


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
            try:
                with open(file, "rb") as stream:
                    size = int.from_bytes(stream.read(8), "little")
                    if size > MAX_HEADER_BYTES:
                        raise ValueError(f"its header of {size} bytes is larger than {MAX_HEADER_BYTES}")
                    entry = json.loads(stream.read(size)).get(name)
                if entry is not None:
                    rows, columns = entry["shape"]
                    return cls(file, 8 + size + entry["data_offsets"][0], STORED[entry["dtype"]], (rows, columns))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{file} is not readable as safetensors: {error}") from None
        raise ModelError(f"{model_dir} has no tensor {name}")

    def pieces(self, num_rows: int) -> Iterator[torch.Tensor]:
        """All rows in order, at most `num_rows` at a time. Raises `ModelError`."""
        columns = self.shape[1]
        with open(self.file, "rb") as stream:
            stream.seek(self.offset)
            for start in range(0, self.shape[0], num_rows):
                rows = min(num_rows, self.shape[0] - start)
                data = bytearray(rows * columns * self.dtype.itemsize)
                if stream.readinto(data) != len(data):
                    raise ModelError(f"{self.file} ends within its tensors; download it again")
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
