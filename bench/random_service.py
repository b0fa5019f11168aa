"""A model directory of a published shape with random weights, small random LoRAs, and prompts for them.

What it answers is noise; what its steps cost is what those of a trained one of that size cost. The tokenizer has a
word for each token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from specserve.model.shapes import PARENT

from .adapter_files import write_adapters
from .load_memory import write_model
from .shapes import ModelShape


def write_service(
    shape: ModelShape, root: Path, num_adapters: int, rank: int, modules: Sequence[str] = tuple(PARENT)
) -> None:
    """`model` and `adapters` in `root`."""
    model_dir, adapters_dir = root / "model", root / "adapters"
    for folder in (model_dir, adapters_dir):
        folder.mkdir()
    write_model(shape, model_dir)
    words = {f"w{idx}": idx for idx in range(shape.vocab_size)}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(model_dir / "tokenizer.json"))
    write_adapters(adapters_dir, shape.config(), num_adapters, rank, modules)


def random_prompts(shape: ModelShape, num: int, length: int, seed: int) -> list[list[int]]:
    """`num` of `length` tokens each, which begin differently."""
    rng = random.Random(seed)
    return [[rng.randrange(16, shape.vocab_size) for _ in range(length)] for _ in range(num)]
