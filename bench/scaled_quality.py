"""What do weights of 8 bits with a scale for each output, as --quantization has them on CUDA, cost in quality?

Perplexity of the tasks' gold completions (prompt given), on the base and with each LoRA, for the model as it is and for
copies whose linears and lm_head are what int8 and fp8 make of them. All of it in fp32 on the CPU, so that nothing but
the weights differs; no GPU is needed. The limit is the model as it is. bench.quantization asks the same of the CPU's
own formats.

    python -m bench.scaled_quality ADAPTER_DIR ... --data FILE ... [--rows 30]
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click
import safetensors.torch
import torch

from specserve.config import EngineConfig
from specserve.engine.engine import Engine
from specserve.kernels.scaled_weights import DTYPES, ScaledLinear
from specserve.model.shapes import EMBEDDING, LM_HEAD

from . import common, options
from .quantization import mean_log_prob
from .tasks import BaseModel


def write_copy(source: Path, target: Path, form: str) -> None:
    """The model in fp32, its linears and lm_head as values of `form` times scales; the embedding stays."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(file)
    tensors.setdefault(LM_HEAD, tensors[EMBEDDING])
    for name, tensor in tensors.items():
        is_linear = tensor.ndim == 2 and name != EMBEDDING
        tensors[name] = ScaledLinear(tensor, None, form).unpacked() if is_linear else tensor.float().clone()
    safetensors.torch.save_file(tensors, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


@click.command(help=__doc__.partition("\n")[0])
@options.adapters
@options.for_each_adapter("--data")
@options.model
@options.at_least(1, "--rows", 30, "Held-out rows of each task.")
@options.save("scaled_quality")
def main(adapters: tuple[Path, ...], data: tuple[Path, ...], model: str, rows: int, save: bool) -> None:
    options.check_one_each(adapters, data=data)
    run = common.start("scaled_quality", "torch")
    base = BaseModel.load(model)
    click.echo("limit: the perplexities of the model as it is")
    tasks = [base.examples(file, rows) for file in data]
    figures: dict[str, dict[str, Any]] = {}
    for form in ("none", *DTYPES):
        with tempfile.TemporaryDirectory() as folder:
            path = base.path
            if form != "none":
                path = Path(folder) / "model"
                write_copy(base.path, path, form)
            settings = EngineConfig(
                model=str(path), device="cpu", dtype="fp32", max_num_seqs=1, kv_cache_gib=0.5, max_waiting=10**5
            )
            engine = Engine(settings, path)
        figures[form] = {}
        for adapter, examples in zip(adapters, tasks, strict=True):
            key = engine.load_adapter(adapter.name, adapter).content_hash
            scores = {"perplexity_base": mean_log_prob(engine, None, examples)}
            scores["perplexity"] = mean_log_prob(engine, key, examples)
            figures[form][adapter.name] = {name: round(math.exp(-score), 4) for name, score in scores.items()}
            click.echo(f"{form}, {adapter.name}: {figures[form][adapter.name]}")
    run.finish({"model": base.name, "rows": rows, "figures": figures}, save)


if __name__ == "__main__":
    main()
