"""Lookahead LoRAs of a tiny model, with random heads: what they draft is garbage of the right shape."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from peft_adapters import make_peft_adapter

from specserve.drafters.head import head_shapes
from specserve.drafters.head_file_names import HISTORY_FILE
from specserve.drafters.head_files import FORMAT_VERSION, LookaheadConfig, file_hash, write_head
from specserve.drafters.task_history import TaskHistory
from specserve.model.fingerprint import base_fingerprint, tokenizer_fingerprint

HIDDEN_SIZE = 64


def make_lookahead_adapter(
    model_dir: Path,
    path: Path,
    *,
    seed: int = 0,
    state_size: int = 16,
    vocab_size: int = 100,
    window: int = 4,
    draft_len: int = 6,
    history: bool = True,
    std: float = 1.0,
    **changes,
) -> Path:
    """A PEFT LoRA with a random head beside it; `changes` overwrite fields of its configuration."""
    make_peft_adapter(model_dir, path, seed=seed, std=0.3, r=4)
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(1, *shape, generator=generator) * std
        for name, shape in head_shapes(HIDDEN_SIZE, state_size, vocab_size, window).items()
    }
    config = {
        "format_version": FORMAT_VERSION,
        "base_hash": base_fingerprint(model_dir),
        "tokenizer_hash": tokenizer_fingerprint(model_dir),
        "lora_hash": file_hash(path / "adapter_model.safetensors"),
        "hidden_size": HIDDEN_SIZE,
        "state_size": state_size,
        "tap_layer": seed % 2,
        "draft_len": draft_len,
        "copy_window": window,
        "copy_start": 1,
        "vocab": sorted(rng.sample(range(320), vocab_size)),
        **changes,
    }
    write_head(path, LookaheadConfig(**config), tensors)
    if history:
        completions = [[rng.randrange(320) for _ in range(rng.randrange(1, 30))] for _ in range(20)]
        TaskHistory.build(completions, 1000).save(path / HISTORY_FILE)
    return path
