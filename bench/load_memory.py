"""How much memory does loading a model take at its peak, over what it holds afterwards, and how long does it take?

Writes a model directory of a published shape with random weights, tensor by tensor, and loads it from there as a server
does. The limit is what stays: the weights in the form that is multiplied. Linux only: peaks are read in /proc.

    python -m bench.load_memory [--shape smollm2|1b|3b] [--quantization int8] [--kernels auto]
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

from specserve.compute.loader import choose_paths, load_model
from specserve.config import EngineConfig
from specserve.memory import give_memory_back

from . import common, options
from .cpu_cases import BITS, SHAPES
from .random_models import RandomWeights
from .shapes import ModelShape

MOST_IN_A_FILE = 1 << 30


def write_model(shape: ModelShape, folder: Path) -> int:
    """A model directory; returns the bytes of its tensors."""
    config = shape.config()
    names: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}
    total = 0

    def write() -> None:
        file = f"model-{len(set(names.values()))}.safetensors"
        save_file(held, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(held, file))
        held.clear()

    for name, tensor in RandomWeights(config, torch.device("cpu"), torch.bfloat16).stored():
        held[name] = tensor
        total += tensor.nbytes
        if sum(part.nbytes for part in held.values()) > MOST_IN_A_FILE:
            write()
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    fields = {
        "architectures": [config.architecture],
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": config.activation,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": 500_000.0,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return total


def resident(name: str) -> int:
    """Bytes of this process, VmRSS now or VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@click.command(help=__doc__.partition("\n")[0])
@click.option("--shape", type=click.Choice(list(SHAPES)), default="smollm2", show_default=True)
@click.option("--quantization", type=click.Choice(list(BITS)), default="none", show_default=True)
@click.option("--kernels", default="auto", show_default=True)
@options.save("load_memory", default=False)
def main(shape: str, quantization: str, kernels: str, save: bool) -> None:
    run = common.start("load_memory", "torch", "safetensors")
    settings = EngineConfig(quantization=quantization, kernels=kernels)  # type: ignore[arg-type]
    device = torch.device("cpu")
    choices = choose_paths(settings, device)
    with tempfile.TemporaryDirectory(prefix="specserve-") as folder:
        stored = write_model(SHAPES[shape], Path(folder))
        give_memory_back()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
        before, start = resident("VmRSS"), time.perf_counter()
        decoder = load_model(folder, device, "auto", choices)
        took = time.perf_counter() - start
        held, peak = resident("VmRSS") - before, resident("VmHWM") - before
    click.echo(
        f"limit: {stored / 1e9:.2f} GB of tensors are {held / 1e9:.2f} GB as {type(decoder).__name__} holds them\n"
        f"loading took {took:.1f} s and {peak / 1e9:.2f} GB at its peak, {peak / held:.2f} times what stays"
    )
    fields = {
        "shape": shape,
        "quantization": quantization,
        "decoder": type(decoder).__name__,
        "stored_bytes": stored,
        "held_bytes": held,
        "peak_bytes": peak,
        "peak_over_held": round(peak / held, 3),
        "load_s": round(took, 2),
    }
    run.finish(fields, save)


if __name__ == "__main__":
    main()
