"""Does throughput fall with the number of registered adapters, when Zipf decides which of them are asked for?

One engine for each number, all in one process and with the same adapters in memory; each round serves the same number
of requests on every engine, in an order that turns from round to round. Eight requests (--batch) are kept running, so
adapters come and go as requests end. Each engine serves one unmeasured round first. Greedy, no drafts, no prefix cache:
every engine does the same work but for which adapters its rows use. The wanted ratio is 1,000 adapters >= 0.95 x 8.

The limit is printed first: a step cannot be faster than reading the base weights and, for each distinct adapter of its
rows, the adapter's weights. Beside it stand the distinct adapters of a step, and the share of the time that went into
making adapters ready for a step (`AdapterSlots.activate`), which is where a number of adapters would show.

    python -m bench.adapter_scaling [--adapters 1,8,64,256,1000] [--rounds 3] [--requests 32] [--rank 8]
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from specserve.adapters.lora import LoraAdapter
from specserve.config import EngineConfig
from specserve.engine.engine import Engine
from specserve.loadgen.plan import pick_models
from specserve.messages import GenerateRequest, SamplingParams, Speculation
from specserve.model.shapes import PARENT, module_shapes

from . import common, options
from .generation import generate
from .tasks import BaseModel, read_prompts


@dataclass(slots=True)
class Level:
    """One engine and what was measured on it, one value a round."""

    engine: Engine
    hashes: list[str]  # most popular first
    activate_s: float = 0.0
    distinct: list[int] = field(default_factory=list)  # adapters of each step
    tokens_per_s: list[float] = field(default_factory=list)
    activate_share: list[float] = field(default_factory=list)

    def watch_activate(self) -> None:
        """Time the step's `activate` calls and note how many adapters each was given."""
        slots = self.engine.runner.slots
        activate = slots.activate

        def timed(active: Any) -> None:
            start_s = time.perf_counter()
            activate(active)
            self.activate_s += time.perf_counter() - start_s
            self.distinct.append(len(active))

        slots.activate = timed  # type: ignore[method-assign]


@click.command(help=__doc__.partition("\n")[0])
@options.numbers("--adapters", "1,8,64,256,1000", "Numbers of registered adapters.")
@options.model
@options.rounds(3)
@options.at_least(1, "--requests", 32, "Of a round, on each engine.")
@options.at_least(1, "--batch", 8, "Requests at the same time.")
@options.at_least(2, "--tokens", 32, "Mean output of a request.")
@options.at_least(1, "--prompt-len", 32, "Tokens of each prompt.")
@options.at_least(1, "--rank", 8)
@click.option("--modules", default="q_proj,v_proj", show_default=True, help="Linears with LoRA; peft's own default.")
@click.option("--zipf-exponent", type=click.FloatRange(0), default=1.0, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Default: all cores.")
@options.save("adapter_scaling")
def main(
    adapters: list[int], model: str, rounds: int, requests: int, batch: int, tokens: int, prompt_len: int, rank: int,
    modules: str, zipf_exponent: float, threads: int | None, save: bool,
) -> None:  # fmt: skip
    run = common.start("adapter_scaling", "torch")
    base = BaseModel.load(model)
    config = EngineConfig(
        model=str(base.path),
        max_num_seqs=batch,
        max_model_len=prompt_len + 2 * tokens,
        kv_cache_gib=0.1,
        prefix_caching=False,
        speculation="off",
        max_adapters=max(adapters),
        num_threads=threads or common.num_cores(),
    )
    engines = {number: Engine(config, base.path) for number in adapters}
    start_s = time.perf_counter()
    loras = make_adapters(engines[max(adapters)], max(adapters), rank, modules.split(","))
    adapter_bytes = loras[0].info().size_bytes
    click.echo(f"read {len(loras)} adapters of {adapter_bytes / 1e6:.2f} MB in {time.perf_counter() - start_s:.1f} s")
    floor = common.WeightFloor.measured(base.path)
    click.echo(
        f"limit: a step that only reads weights takes {floor.ms():.1f} ms at 16 bits, "
        f"and {1e3 * adapter_bytes / floor.bytes_per_s:.2f} ms for each distinct adapter"
    )
    prompts = [base.tokenizer.encode(row["prompt"], False)[:prompt_len] for row in read_prompts()]
    levels = {}
    for number, engine in engines.items():
        for lora in loras[:number]:
            engine.register_adapter(lora)
        levels[number] = Level(engine, [lora.content_hash for lora in loras[:number]])
        levels[number].watch_activate()
    for round_idx in range(rounds + 1):
        turn = round_idx % len(adapters)
        for number in [*adapters[turn:], *adapters[:turn]]:
            serve(levels[number], prompts, requests, batch, tokens, zipf_exponent, round_idx, measured=round_idx > 0)
        if round_idx > 0:
            rates = ", ".join(f"{number} adapters {levels[number].tokens_per_s[-1]:.1f}" for number in adapters)
            click.echo(f"round {round_idx}, tokens/s: {rates}")
    figures = {}
    for number, level in levels.items():
        versus = [a / b for a, b in zip(level.tokens_per_s, levels.get(8, level).tokens_per_s, strict=True)]
        figures[number] = {
            "tokens_per_s": common.spread(level.tokens_per_s),
            "ratio_to_8": common.spread(versus) if 8 in levels else None,
            "distinct_a_step": round(statistics.mean(level.distinct), 2),
            "activate_share": common.spread(level.activate_share),
        }
        click.echo(f"{number} adapters: {figures[number]}")
    settings = {
        "model": base.name, "dtype": engines[adapters[0]].info.dtype, "rank": rank, "modules": modules,
        "adapter_mb": round(adapter_bytes / 1e6, 3), "batch": batch, "rounds": rounds, "requests": requests,
        "prompt_len": prompt_len, "tokens": tokens, "zipf_exponent": zipf_exponent, "threads": config.num_threads,
    }  # fmt: skip
    run.finish({**settings, "figures": figures}, save)


def make_adapters(engine: Engine, num: int, rank: int, modules: list[str]) -> list[LoraAdapter]:
    """Random LoRAs, written as PEFT directories one after the other and read back as the engine reads any."""
    shapes = module_shapes(engine.decoder.config)
    unknown = [name for name in modules if name not in PARENT]
    if unknown:
        raise click.UsageError(f"--modules: {', '.join(unknown)} are not linears of a layer")
    adapters = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules}
        (path / "adapter_config.json").write_text(json.dumps(settings))
        for idx in range(num):
            generator = torch.Generator().manual_seed(idx)
            tensors: dict[str, torch.Tensor] = {}
            for layer in range(engine.decoder.config.num_layers):
                for name in modules:
                    size_in, size_out = shapes[name]
                    key = f"base_model.model.model.layers.{layer}.{PARENT[name]}.{name}"
                    a = torch.randn(rank, size_in, generator=generator) * size_in**-0.5
                    b = torch.randn(size_out, rank, generator=generator) * 0.02
                    tensors |= {f"{key}.lora_A.weight": a.bfloat16(), f"{key}.lora_B.weight": b.bfloat16()}
            save_file(tensors, path / "adapter_model.safetensors")
            adapters.append(engine.read_adapter(f"random-{idx}", path))
    return adapters


def serve(
    level: Level, prompts: list[list[int]], num: int, batch: int, tokens: int, zipf_exponent: float, round_idx: int,
    *, measured: bool,
) -> None:  # fmt: skip
    """Serve `num` requests, `batch` at a time; the draw of adapters is the round's own."""
    engine = level.engine
    chosen = pick_models(level.hashes, num, "zipf", zipf_exponent, str(round_idx))
    level.activate_s = 0.0
    requests = [
        GenerateRequest(
            f"{round_idx}-{idx}",
            prompts[(round_idx * num + idx) % len(prompts)],
            # from half to one and a half of `tokens`: equal ones would end, and change adapters, all at once
            SamplingParams(max_tokens=tokens // 2 + 1 + (7 * idx) % tokens, temperature=0.0, ignore_eos=True),
            adapter_hash=adapter,
            speculation=Speculation("off"),
        )
        for idx, adapter in enumerate(chosen)
    ]
    outputs, elapsed_s = generate(engine, requests, batch)
    num_tokens = sum(len(output.token_ids) for output in outputs)
    if not measured:
        level.distinct.clear()
    else:
        level.tokens_per_s.append(num_tokens / elapsed_s)
        level.activate_share.append(level.activate_s / elapsed_s)


if __name__ == "__main__":
    main()
