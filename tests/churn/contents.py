"""Adapter contents to churn with: directories that are never changed, in families that differ in one file.

Contents of a family have all but `Family.file` in common, so that this file alone, copied over another's, turns one
content into the other. Equal arguments give equal files.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from specserve.model.config import ModelConfig
from specserve.model.shapes import module_shapes

WEIGHTS, TEMPLATE = "adapter_model.safetensors", "chat_template.jinja"
HEAD_FILES = ("lookahead_config.json", "lookahead.safetensors", "lookahead_history.bin")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MODULES = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
SYSTEM_TURN = "{{ '<|im_start|>system\\nAnswer as %s would.<|im_end|>\\n' }}"


@dataclass(frozen=True, slots=True)
class Content:
    """`weights`: contents of equal weights may answer a prompt alike; all others must not."""

    name: str
    family: str
    weights: str
    folder: Path
    file: str  # the one that differs within the family


def make_contents(model_dir: Path, demos: list[Path], root: Path) -> dict[str, Content]:
    """Write every content under `root`. `demos`: lookahead LoRAs of the model that share one adapter_config."""
    config = ModelConfig.from_dir(model_dir)
    made: list[Content] = []

    def add(name: str, family: str, weights: str | None = None, file: str = WEIGHTS) -> Path:
        made.append(Content(name, family, weights or name, root / name, file))
        return root / name

    for demo in demos:
        copy_adapter(demo, add(demo.name, "lookahead"))
    # The first demo's LoRA without a head, and with another's, which does not fit it: the text is the LoRA's.
    plain = add(f"{demos[0].name}-plain", "lookahead", demos[0].name)
    copy_adapter(demos[0], plain, without=HEAD_FILES)
    foreign = add(f"{demos[0].name}-foreign-head", "lookahead", demos[0].name)
    copy_adapter(demos[1], foreign)
    shutil.copyfile(demos[0] / WEIGHTS, foreign / WEIGHTS)
    std = 0.3 if config.hidden_size < 256 else 0.08  # less leaves many texts as they are
    for rank, dtype, modules, num in (
        (4, torch.bfloat16, ("q_proj", "v_proj"), 2),
        (16, torch.bfloat16, MODULES, 3),
        (64, torch.float32, MODULES, 2),
        (128, torch.float32, MODULES, 2),
    ):
        for idx in range(num):
            name = f"r{rank}-{idx}"
            write_random(add(name, f"r{rank}"), config, rank, dtype, modules, std, seed=100 * rank + idx)
    template = (model_dir / TEMPLATE).read_text(encoding="utf-8")
    for who in ("a pirate", "a judge"):
        folder = add(f"template-{who.split()[-1]}", "template", "template", TEMPLATE)
        write_random(folder, config, 8, torch.bfloat16, ATTENTION, std, seed=8)
        (folder / TEMPLATE).write_text(SYSTEM_TURN % who + template, encoding="utf-8")
    return {content.name: content for content in made}


def copy_adapter(source: Path, folder: Path, without: tuple[str, ...] = ()) -> None:
    names = ("adapter_config.json", WEIGHTS, *HEAD_FILES)
    folder.mkdir(parents=True)
    for name in names:
        if name not in without and (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def write_random(
    folder: Path, config: ModelConfig, rank: int, dtype: torch.dtype, modules: tuple[str, ...], std: float, seed: int
) -> None:
    """A PEFT directory with random weights; the size of its effect does not depend on the rank."""
    generator = torch.Generator().manual_seed(seed)
    shapes, tensors = module_shapes(config), {}
    for layer in range(config.num_layers):
        for name in modules:
            size_in, size_out = shapes[name]
            key = f"base_model.model.model.layers.{layer}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}"
            a = torch.randn(rank, size_in, generator=generator) * size_in**-0.5
            b = torch.randn(size_out, rank, generator=generator) * std
            tensors |= {f"{key}.lora_A.weight": a.to(dtype), f"{key}.lora_B.weight": b.to(dtype)}
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8 * rank**0.5, "target_modules": list(modules)}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file(tensors, folder / WEIGHTS)


def tiny_demos(model_dir: Path, root: Path) -> list[Path]:
    """Lookahead LoRAs with random heads for a tiny model."""
    from lookahead_adapters import make_lookahead_adapter

    demos = [make_lookahead_adapter(model_dir, root / f"tiny-{idx}", seed=idx) for idx in range(3)]
    for demo in demos[1:]:  # peft writes sets in any order
        shutil.copyfile(demos[0] / "adapter_config.json", demo / "adapter_config.json")
    assert len({tuple(load_file(demo / WEIGHTS)) for demo in demos}) == 1
    return demos
