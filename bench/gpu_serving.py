"""On a GPU: what do drafts gain at each load, is `auto` ever slower than `off`, and how far is transformers + peft?

The default model with the three demo adapters mixed, held-out prompts, greedy, EOS honoured, prompts included. At each
load the ways take turns: without drafts, `auto`, and at --peft-batch transformers' generate with peft's mixed adapters
on the same prompts (all of them at once, left-padded, up to the same longest answer, its padding not counted).

    python -m bench.gpu_serving [--loads 1,8,32,128,256] [--rounds 3] [--device cuda]
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click
import torch

from specserve.config import EngineConfig
from specserve.engine.engine import Engine
from specserve.training.evaluation.answers import answer_mixed

from . import common, options
from .gpu_timing import copy_bandwidth
from .tasks import DEMO_TASKS, BaseModel, demo_adapter, demo_rows, in_turn

WANTED = {1: 4.5, 8: 3.0, 32: 2.0, 128: 1.5, 256: 1.3}
WANTED_PEFT = 20.0


class Peft:
    """transformers' generate with the demo adapters, mixed in a batch."""

    def __init__(self, model_dir: Path, device: str, eos: Collection[int]):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device)
        for idx, task in enumerate(DEMO_TASKS):
            path = str(demo_adapter(task))
            if idx == 0:
                model = PeftModel.from_pretrained(model, path, adapter_name=task, autocast_adapter_dtype=False)
            else:
                model.load_adapter(path, adapter_name=task, autocast_adapter_dtype=False)
        self._model, self._device, self._eos = model.eval(), device, sorted(eos)

    @torch.inference_mode()
    def tokens_per_s(self, requests: list[tuple[str, list[int]]], max_tokens: int) -> float:
        longest = max(len(prompt) for _, prompt in requests)
        ids = torch.tensor([[0] * (longest - len(p)) + p for _, p in requests], device=self._device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for _, p in requests], device=self._device)
        start = time.perf_counter()
        output = self._model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False, pad_token_id=0,
            eos_token_id=self._eos, adapter_names=[task for task, _ in requests],
        )  # fmt: skip
        rows = output[:, longest:].tolist()  # waits for the device
        seconds = time.perf_counter() - start
        return sum(_answer_len(row, set(self._eos)) for row in rows) / seconds


def _answer_len(row: list[int], eos: set[int]) -> int:
    """Tokens up to the first that ends the answer, itself included."""
    return next((idx + 1 for idx, token in enumerate(row) if token in eos), len(row))


@click.command(help=__doc__.partition("\n")[0])
@options.numbers("--loads", "1,8,32,128,256", "Requests at a time.")
@options.rounds(3)
@options.at_least(1, "--max-tokens", 200)
@options.at_least(1, "--max-requests", 384, "Of one way and load.")
@options.at_least(0, "--peft-batch", 8, "0 leaves transformers out.")
@click.option("--device", default="cuda", show_default=True)
@options.save("gpu_serving", default=False)
def main(
    loads: list[int], rounds: int, max_tokens: int, max_requests: int, peft_batch: int, device: str, save: bool
) -> None:
    run = common.start("gpu_serving", "torch", "triton", "transformers", "peft", device=device)
    base = BaseModel.load()
    place = torch.device(device)
    bandwidth = copy_bandwidth(place, 1 << (31 if place.type == "cuda" else 26))
    torch.cuda.empty_cache()  # the engine takes for its KV what is free
    floor = common.WeightFloor(common.num_parameters(base.path), bandwidth)
    click.echo(f"floor: a step that only reads the weights at 16 bits takes {floor.ms():.3f} ms")
    config = EngineConfig(
        model=str(base.path), device=device, max_num_seqs=max(loads), max_model_len=2048, max_waiting=100_000
    )  # type: ignore[arg-type]
    start = time.perf_counter()
    engine = Engine(config, base.path)
    start_s = time.perf_counter() - start
    click.echo(
        f"the engine started in {start_s:.1f} s on {engine.info.device}, {engine.info.dtype}, "
        f"exact {engine.info.is_exact}"
    )
    gc.collect()
    gc.freeze()  # as the engine's process
    hashes = [engine.load_adapter(task, demo_adapter(task)).content_hash for task in DEMO_TASKS]
    prompts = [base.prompts(demo_rows(task)) for task in DEMO_TASKS]
    figures: dict[str, Any] = {}
    for size in loads:
        num_requests = min(max_requests, max(12, 2 * size))
        mixed = [(hashes[task], prompt) for task, prompt in itertools.islice(in_turn(prompts), num_requests)]
        figures[str(size)] = of_load(engine, mixed, size, rounds, max_tokens)
        click.echo(f"{size} at a time: {json.dumps(figures[str(size)])}")
    if peft_batch:
        asked = list(itertools.islice(in_turn(prompts), peft_batch))
        peft = Peft(base.path, device, base.eos)
        figures["peft"] = against_peft(engine, peft, hashes, asked, rounds, max_tokens)
        click.echo(f"against transformers + peft: {json.dumps(figures['peft'])}")
    settings = {"dtype": engine.info.dtype, "rounds": rounds, "start_s": round(start_s, 1)}
    run.finish({**settings, "figures": figures}, save)


def of_load(
    engine: Engine, requests: list[tuple[str, list[int]]], size: int, rounds: int, max_tokens: int
) -> dict[str, Any]:
    """`requests` of (adapter hash, prompt), `size` at a time, without drafts and with."""
    rates: dict[str, list[float]] = {"off": [], "auto": []}
    lengths = []
    for mode in ("off", "auto"):  # graphs of this load, costs
        answer_mixed(engine, requests, max_tokens, mode=mode, batch=size)
    for round_idx in range(rounds):
        for mode in ("off", "auto") if round_idx % 2 else ("auto", "off"):
            done = answer_mixed(engine, requests, max_tokens, mode=mode, batch=size)
            rates[mode].append(done.num_tokens / done.seconds)
            if mode == "auto":
                lengths.append(done.mean_accepted_length)
    return {
        "tokens_per_s": {mode: common.spread(values) for mode, values in rates.items()},
        "ratio": common.spread([auto / off for auto, off in zip(rates["auto"], rates["off"], strict=True)]),
        "mean_accepted_length": round(statistics.median(lengths), 2),
        "wanted": WANTED.get(size),
    }


def against_peft(
    engine: Engine, peft: Peft, hashes: list[str], asked: list[tuple[int, list[int]]], rounds: int, max_tokens: int
) -> dict[str, Any]:
    """`asked` are (task, prompt), all at once on both sides."""
    named = [(DEMO_TASKS[task], prompt) for task, prompt in asked]
    mixed = [(hashes[task], prompt) for task, prompt in asked]
    ours, theirs = [], []
    peft.tokens_per_s(named, 8)
    for _ in range(rounds):
        done = answer_mixed(engine, mixed, max_tokens, mode="auto", batch=len(mixed))
        ours.append(done.num_tokens / done.seconds)
        theirs.append(peft.tokens_per_s(named, max_tokens))
    return {
        "batch": len(asked),
        "tokens_per_s": {"specserve": common.spread(ours), "transformers + peft": common.spread(theirs)},
        "ratio": common.spread([a / b for a, b in zip(ours, theirs, strict=True)]),
        "wanted": WANTED_PEFT,
    }


if __name__ == "__main__":
    main()
