"""Directories of many small random LoRAs, for benches that need more adapters than anybody has trained."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from specserve.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from specserve.adapters.lora import LoraAdapter
from specserve.engine.engine import Engine
from specserve.model.config import ModelConfig
from specserve.model.shapes import PARENT, module_shapes


def write_adapters(root: Path, config: ModelConfig, num: int, rank: int, modules: Sequence[str]) -> list[str]:
    """`num` PEFT directories in `root`, all different, of one `rank` on `modules` of every layer; their names."""
    generator, shapes = torch.Generator().manual_seed(0), module_shapes(config)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(config.num_layers):
        for module in modules:
            size_in, size_out = shapes[module]
            key = f"base_model.model.model.layers.{layer}.{PARENT[module]}.{module}"
            a = torch.randn(rank, size_in, generator=generator) * size_in**-0.5
            b = torch.randn(size_out, rank, generator=generator) * 0.02
            tensors |= {f"{key}.lora_A.weight": a.bfloat16(), f"{key}.lora_B.weight": b.bfloat16()}
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(modules)}
    names = [f"random-{idx}" for idx in range(num)]
    for idx, name in enumerate(names):
        (root / name).mkdir()
        (root / name / CONFIG_FILE).write_text(json.dumps(settings))
        # Others by their order alone: quick to make, and no two have the same bytes.
        rolled = {key: tensor.roll(idx, dims=1) for key, tensor in tensors.items()}
        save_file(rolled, root / name / WEIGHTS_FILE, metadata={"format": "pt", "idx": str(idx)})
    return names


def make_adapters(engine: Engine, num: int, rank: int, modules: Sequence[str]) -> list[LoraAdapter]:
    """The same as `engine` holds them, without a directory that stays."""
    with tempfile.TemporaryDirectory() as folder:
        names = write_adapters(Path(folder), engine.decoder.config, num, rank, modules)
        return [engine.adapters.read(name, Path(folder) / name) for name in names]
