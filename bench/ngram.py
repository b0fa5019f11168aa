"""Do drafts that need no training pay: prompt lookup (n-gram), and the client's own prediction of the output?

One engine, one process; each round runs the same requests without drafts, with n-gram drafts, and with the gold
completion as the OpenAI-style `prediction`, in an order that turns from round to round. Greedy, EOS honoured, so that a
model that has nothing more to say does not repeat itself to the drafter's advantage. The task copies: a Debian control
stanza becomes JSON. The base model is told so in the prompt; with --adapter a LoRA that was trained for it does it.
The tokens of all ways must be equal, or the bench ends with an error. The floor is the weights' bytes over a measured
read rate: the milliseconds of a step that only reads weights; drafts win by taking fewer steps.

    python -m bench.ngram [--model DIR] [--rounds 5] [--batch 1,8] [--tokens 120] [--adapter DIR] [--prompts 16]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch

from specserve.config import EngineConfig
from specserve.engine.engine import Engine
from specserve.messages import GenerateRequest, SamplingParams, Speculation, Usage

from . import common, options
from .generation import Output, generate
from .tasks import BaseModel, chat_token_ids, read_prompts

INSTRUCTION = "Convert this Debian control stanza to JSON. Answer with the JSON object only.\n\n"
WAYS = ("off", "ngram", "prediction")


@dataclass(slots=True)
class Task:
    prompt: list[int]
    gold: list[int]


@dataclass(slots=True)
class Figures:
    """One way of one batch size, a value a round."""

    tokens_per_s: list[float] = field(default_factory=list)
    tokens_per_step: list[float] = field(default_factory=list)
    acceptance: list[float] = field(default_factory=list)  # of draft tokens; none drafted: not counted


class Asker:
    """Asks one engine for batches of tasks."""

    def __init__(self, engine: Engine, adapter_hash: str | None, num_tokens: int):
        self.engine, self.adapter_hash = engine, adapter_hash
        self._sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)

    def ask(self, tasks: list[Task], way: str) -> tuple[list[Output], float]:
        """All tasks at once: their outputs and the seconds until the last token."""
        requests = [
            GenerateRequest(
                str(idx),
                task.prompt,
                self._sampling,
                adapter_hash=self.adapter_hash,
                speculation=Speculation("auto" if way == "prediction" else way),  # type: ignore[arg-type]
                prediction_token_ids=task.gold if way == "prediction" else [],
            )
            for idx, task in enumerate(tasks)
        ]
        return generate(self.engine, requests, len(tasks))


def measure(asker: Asker, tasks: list[Task], batch: int, rounds: int) -> dict[str, Figures]:
    """Interleaved rounds over all tasks, `batch` at a time; ends the bench where the ways' tokens differ."""
    groups = [tasks[first : first + batch] for first in range(0, len(tasks), batch)]
    figures = {way: Figures() for way in WAYS}
    for way in WAYS:
        asker.ask(groups[0], way)  # warm-up
    for round_idx in range(rounds):
        seconds = dict.fromkeys(WAYS, 0.0)
        usages: dict[str, list[Usage]] = {way: [] for way in WAYS}
        for group_idx, group in enumerate(groups):
            turn = (round_idx + group_idx) % len(WAYS)
            tokens = {}
            for way in WAYS[turn:] + WAYS[:turn]:
                outputs, elapsed = asker.ask(group, way)
                seconds[way] += elapsed
                tokens[way] = [output.token_ids for output in outputs]
                usages[way] += [output.usage for output in outputs]
            for way in WAYS[1:]:
                check_equal(tokens["off"], tokens[way], way, batch)
        for way in WAYS:
            counts = usages[way]
            num_tokens = sum(usage.completion_tokens for usage in counts)
            num_drafts = sum(usage.draft_tokens for usage in counts)
            figures[way].tokens_per_s.append(num_tokens / seconds[way])
            figures[way].tokens_per_step.append(num_tokens / sum(usage.num_forwards for usage in counts))
            if num_drafts:
                num_accepted = sum(usage.accepted_draft_tokens for usage in counts)
                figures[way].acceptance.append(num_accepted / num_drafts)
    return figures


def check_equal(plain: list[list[int]], drafted: list[list[int]], way: str, batch: int) -> None:
    for idx, (ours, theirs) in enumerate(zip(plain, drafted, strict=True)):
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
            raise click.ClickException(
                f"{way}, batch {batch}: request {idx} differs from plain decoding at token {at}; with --dtype fp32 "
                "that is a bug, otherwise look at the margin between the two likeliest tokens there first"
            )


@click.command(help=__doc__.partition("\n")[0])
@options.model
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True)
@click.option("--adapter", type=options.ADAPTER, help="A LoRA of the task: no instruction.")
@options.rounds(5)
@options.numbers("--batch", "1,8", "Requests at the same time.")
@options.at_least(1, "--tokens", 120, "Most output tokens of a request.")
@options.at_least(1, "--prompts", 16, "Of the 32 control2json rows.")
@options.save("ngram")
def main(
    model: str, dtype: str, adapter: Path | None, rounds: int, batch: list[int], tokens: int, prompts: int, save: bool
) -> None:
    from transformers import AutoTokenizer

    run = common.start("ngram", "torch")
    base = BaseModel.load(model)
    floor = common.WeightFloor.measured(base.path)
    engine = Engine(
        EngineConfig(device="cpu", dtype=dtype, kv_cache_gib=1.0, prefix_caching=False),
        base.path,  # type: ignore[arg-type]
    )
    bits = 32 if engine.info.dtype in ("float32", "fp32") else 16
    print(
        f"limit: {floor.num_bytes(bits) / 1e6:.0f} MB of weights ({engine.info.dtype}) at "
        f"{floor.bytes_per_s / 1e9:.1f} GB/s: {floor.ms(bits):.1f} ms a step, so at most "
        f"{1e3 / floor.ms(bits):.0f} steps/s, however many tokens a step commits"
    )
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    tasks = [
        Task(
            chat_token_ids(tokenizer, ("" if adapter else INSTRUCTION) + row["prompt"]),
            tokenizer(row["completion"], add_special_tokens=False)["input_ids"],
        )
        for row in read_prompts("control2json")[:prompts]
    ]
    adapter_hash = engine.load_adapter("task", adapter).content_hash if adapter else None
    asker = Asker(engine, adapter_hash, tokens)
    print(
        f"\n{'batch':>5}  {'drafts':<10} {'tokens/s':>9} {'min-max':>15} {'x off':>6} {'min-max':>11} "
        f"{'tokens/step':>11}"
    )
    cells: list[dict[str, Any]] = []
    for size in batch:
        figures = measure(asker, tasks, size, rounds)
        for way, figure in figures.items():
            speed, steps = common.spread(figure.tokens_per_s), common.spread(figure.tokens_per_step)
            pairs = zip(figure.tokens_per_s, figures["off"].tokens_per_s, strict=True)
            ratio = common.spread([drafted / plain for drafted, plain in pairs])
            print(
                f"{size:>5}  {way:<10} {speed['median']:>9.1f} {speed['min']:>7.1f}-{speed['max']:<7.1f} "
                f"{ratio['median']:>6.2f} {ratio['min']:>5.2f}-{ratio['max']:<5.2f} {steps['median']:>11.2f}"
            )
            cell = {"batch": size, "drafts": way, "tokens_per_s": speed, "over_off": ratio}
            cell |= {"mean_accepted_length": steps["median"], "rounds": [round(v, 2) for v in figure.tokens_per_s]}
            if figure.acceptance:
                cell["draft_acceptance"] = common.spread(figure.acceptance)["median"]
            cells.append(cell)
    print("tokens of all ways are equal\n")
    fields = {
        "model": base.name,
        "dtype": engine.info.dtype,
        "threads": torch.get_num_threads(),
        "adapter": adapter.name if adapter else None,
        "settings": {"rounds": rounds, "max_tokens": tokens, "prompts": len(tasks), "prefix_caching": False},
        "limit": {"read_gb_per_s": round(floor.bytes_per_s / 1e9, 2), "floor_ms": round(floor.ms(bits), 2)},
        "tokens_equal": True,
        "cells": cells,
    }
    run.finish(fields, save)


if __name__ == "__main__":
    main()
