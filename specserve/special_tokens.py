"""What the engine needs of a tokenizer: the fast backend that decodes, and the ids that end a sequence."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from .errors import ModelError


def load_backend_tokenizer(model_dir: Path) -> Tokenizer:
    """The Rust tokenizer of a model directory. Raises `ModelError` when there is none."""
    path = Path(model_dir) / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{model_dir} has no tokenizer.json; save the model's fast tokenizer there")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the bindings raise bare Exception
        raise ModelError(f"{path} is not readable: {error}") from None


def eos_token_ids(model_dir: Path) -> frozenset[int]:
    """Every id that ends a sequence, from generation_config.json and, without that, config.json."""
    for name in ("generation_config.json", "config.json"):
        path = Path(model_dir) / name
        if path.is_file():
            found = json.loads(path.read_text()).get("eos_token_id")
            if found is not None:
                return frozenset(found if isinstance(found, list) else [found])
    return frozenset()
