"""Whether a model's files hold an lm_head that is not its embedding, whatever config.json says.

config.json may say that both are one matrix where they are not: transformers assumes it of a Mistral 3 that sees, whose
files have two. So values decide, in transformers and here.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .shapes import EMBEDDING, LM_HEAD
from .stored_rows import STORED, StoredRows, StoredTensor, stored_tensors, weight_files

_ROWS_AT_ONCE = 4096


def has_own_head(model_dir: Path) -> bool:
    """By the first rows that differ; False for a directory without weights. Raises `ModelError`."""
    if not any(model_dir.glob("*.safetensors")):
        return False
    found: dict[str, StoredTensor] = {}
    for file in weight_files(model_dir):
        found |= {name: tensor for name, tensor in stored_tensors(file).items() if name in (EMBEDDING, LM_HEAD)}
    if len(found) < 2:
        return False
    head, embedding = found[LM_HEAD], found[EMBEDDING]
    if head.shape != embedding.shape or len(head.shape) != 2 or not {head.dtype, embedding.dtype} <= STORED.keys():
        return True  # what is wrong with it is said when all tensors are checked
    pieces = (_rows(tensor).pieces(_ROWS_AT_ONCE) for tensor in (head, embedding))
    return not all(torch.equal(ours.float(), theirs.float()) for ours, theirs in zip(*pieces, strict=True))


def _rows(tensor: StoredTensor) -> StoredRows:
    num_rows, num_columns = tensor.shape
    return StoredRows(tensor.file, tensor.offset, STORED[tensor.dtype], (num_rows, num_columns))
