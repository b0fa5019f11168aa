"""Copies of the base model's embedding and lm_head that PEFT stores beside an embedding LoRA.

PEFT would put them in the base's place. Unchanged ones are dropped; a trained one cannot be served and is refused, by
however little it differs: equal means equal up to the rounding of the dtypes that the numbers went through.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import AdapterError, ModelError
from ..model.shapes import EMBEDDING
from ..model.stored_rows import StoredRows

_COPIED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TRAINED = (torch.float32, torch.bfloat16, torch.float16)  # what the base may have been loaded as when it was copied
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class BaseCopies:
    """Compares copies with the files of the base model, whose weights are served as `dtype`.

    With the files, not with what was loaded of them: that may be rounded, packed or quantized.
    """

    model_dir: Path
    ties_embedding: bool
    dtype: torch.dtype

    def check(self, adapter: str, key: str, module: str, copy: torch.Tensor) -> None:
        """Raise `AdapterError` unless `copy`, tensor `key` of an adapter, is the base's weight of `module`."""
        try:
            base = StoredRows.find(self.model_dir, EMBEDDING if self.ties_embedding else f"{module}.weight")
            if copy.dtype not in _COPIED:
                raise AdapterError(
                    f"adapter {adapter!r}: {key} is {copy.dtype}, which cannot be compared with the base model's; "
                    "save it as float32, or without it (save_embedding_layers=False)"
                )
            if tuple(copy.shape) != base.shape:
                raise AdapterError(
                    f"adapter {adapter!r}: {key} is {list(copy.shape)} but the base model's is {list(base.shape)}; "
                    "a resized vocabulary is not supported"
                )
            if not self._is_rounded(copy, base):
                raise AdapterError(
                    f"adapter {adapter!r}: {key} differs from the base model's by more than rounding; a trained "
                    f"{module.rpartition('.')[2]} is not supported. If it was not trained, and the base is a "
                    "converted or quantized one, save the adapter without it (save_embedding_layers=False)"
                )
        except (ModelError, OSError) as error:
            raise AdapterError(f"adapter {adapter!r}: {key} cannot be compared with the base model: {error}") from None

    def _is_rounded(self, copy: torch.Tensor, base: StoredRows) -> bool:
        """Whether one way of rounding makes copy and base equal in all elements.

        The copy is the base after training's dtype and its own; or both are equal once rounded as the base is stored,
        or as it is served.
        """
        left = [("trained", dtype) for dtype in _TRAINED]
        left += [("rounded", dtype) for dtype in dict.fromkeys((base.dtype, self.dtype))]
        start = 0
        for rows in base.pieces(_ROWS_AT_ONCE):
            part = copy[start : start + len(rows)]
            start += len(rows)
            left = [(way, dtype) for way, dtype in left if torch.equal(*_ways(way, dtype, part, rows))]
            if not left:
                return False
        return True


def _ways(way: str, dtype: torch.dtype, copy: torch.Tensor, base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if way == "trained":
        return copy, base.to(dtype).to(copy.dtype)
    return copy.to(dtype), base.to(dtype)
