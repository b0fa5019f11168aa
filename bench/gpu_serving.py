"""On a GPU: what do drafts gain at each load, is `auto` ever slower than `off`, and how far is transformers + peft?

The default model with the three demo adapters mixed, held-out prompts, greedy, EOS honoured, prompts included. At each
load the ways take turns: without drafts, `auto`, and at --peft-batch transformers' generate with peft's mixed adapters
on the same prompts (all of them at once, left-padded, up to the same longest answer, its padding not counted).

    python -m bench.gpu_serving [--loads 1,8,32,128,256] [--rounds 3] [--device cuda]
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import click
import torch

from specserve.config import EngineConfig
from specserve.engine.engine import Engine
from specserve.model.store import resolve_model
from specserve.text.special_tokens import eos_token_ids
from specserve.text.tokenizer import TextTokenizer
from specserve.training.answers import answer_mixed
from specserve.training.dataset import read_rows, tokenize

from . import common

TASKS = ("control2json", "debtags", "summary")
WANTED = {1: 3.0, 8: 2.5, 32: 1.8, 128: 1.5, 256: 1.4}
WANTED_PEFT = 20.0
EXAMPLES = common.ROOT / "examples"


class Peft:
    """transformers' generate with the demo adapters, mixed in a batch."""

    def __init__(self, model_dir: Path, device: str, eos: list[int]):
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device)
        for idx, task in enumerate(TASKS):
            path = str(EXAMPLES / "adapters" / task)
            if idx == 0:
                model = PeftModel.from_pretrained(model, path, adapter_name=task, autocast_adapter_dtype=False)
            else:
                model.load_adapter(path, adapter_name=task, autocast_adapter_dtype=False)
        self._model, self._device, self._eos = model.eval(), device, eos

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
@click.option("--loads", default="1,8,32,128,256", show_default=True, help="Requests at a time.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=200, show_default=True)
@click.option("--max-requests", type=click.IntRange(1), default=384, show_default=True, help="Of one way and load.")
@click.option("--peft-batch", type=click.IntRange(0), default=8, show_default=True, help="0 leaves transformers out.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--save/--no-save", default=False, help="Append the result to bench/results/gpu_serving.jsonl.")
def main(loads: str, rounds: int, max_tokens: int, max_requests: int, peft_batch: int, device: str, save: bool) -> None:
    model_dir = resolve_model("")
    sizes = [int(size) for size in loads.split(",")]
    config = EngineConfig(
        model=str(model_dir), device=device, max_num_seqs=max(sizes), max_model_len=2048, max_waiting=100_000
    )  # type: ignore[arg-type]
    start = time.perf_counter()
    engine = Engine(config, model_dir)
    start_s = time.perf_counter() - start
    click.echo(f"the engine started in {start_s:.1f} s on {engine.info.device}, {engine.info.dtype}")
    hashes = {task: engine.load_adapter(task, EXAMPLES / "adapters" / task).content_hash for task in TASKS}
    tokenizer, eos = TextTokenizer(model_dir), sorted(eos_token_ids(model_dir))
    prompts = {
        task: [e.prompt for e in tokenize(read_rows(EXAMPLES / "data" / f"{task}.dev.jsonl"), tokenizer, eos)]
        for task in TASKS
    }
    figures: dict[str, Any] = {}
    for size in sizes:
        num_requests = min(max_requests, max(12, 2 * size))
        requests = [
            (TASKS[i % 3], prompts[TASKS[i % 3]][i // 3 % len(prompts[TASKS[i % 3]])]) for i in range(num_requests)
        ]
        mixed = [(hashes[task], prompt) for task, prompt in requests]
        rates: dict[str, list[float]] = {"off": [], "auto": []}
        lengths = []
        answer_mixed(engine, mixed, max_tokens, mode="auto", batch=size)  # graphs of this load, costs
        for round_idx in range(rounds):
            for mode in ("off", "auto") if round_idx % 2 else ("auto", "off"):
                done = answer_mixed(engine, mixed, max_tokens, mode=mode, batch=size)
                rates[mode].append(done.num_tokens / done.seconds)
                if mode == "auto":
                    lengths.append(done.mean_accepted_length)
        ratios = [auto / off for auto, off in zip(rates["auto"], rates["off"], strict=True)]
        figures[str(size)] = {
            "tokens_per_s": {mode: common.spread(values) for mode, values in rates.items()},
            "ratio": common.spread(ratios),
            "mean_accepted_length": round(statistics.median(lengths), 2),
            "wanted": WANTED.get(size),
        }
        click.echo(f"{size} at a time: {json.dumps(figures[str(size)])}")
    if peft_batch:
        peft = Peft(model_dir, device, eos)
        requests = [(TASKS[i % 3], prompts[TASKS[i % 3]][i // 3]) for i in range(peft_batch)]
        mixed = [(hashes[task], prompt) for task, prompt in requests]
        ours, theirs = [], []
        peft.tokens_per_s(requests, 8)
        for _ in range(rounds):
            done = answer_mixed(engine, mixed, max_tokens, mode="auto", batch=peft_batch)
            ours.append(done.num_tokens / done.seconds)
            theirs.append(peft.tokens_per_s(requests, max_tokens))
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        figures["peft"] = {
            "batch": peft_batch,
            "tokens_per_s": {"specserve": common.spread(ours), "transformers + peft": common.spread(theirs)},
            "ratio": common.spread(ratios),
            "wanted": WANTED_PEFT,
        }
        click.echo(f"against transformers + peft: {json.dumps(figures['peft'])}")
    record = {
        "commit": common.commit(),
        "versions": common.versions("torch", "triton", "transformers", "peft"),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else common.hardware(),
        "dtype": engine.info.dtype,
        "rounds": rounds,
        "start_s": round(start_s, 1),
        "figures": figures,
    }
    if save:
        common.append_result("gpu_serving", record)
    else:
        click.echo(json.dumps({"bench": "gpu_serving", **record}))


if __name__ == "__main__":
    main()
