"""What does the engine add to the steps that a batch of prompts is made of?

Random prompts of one length, all at once, one token each: through the engine; as bare steps of as many rows, one behind
the other, by the same runner; and as such steps of one word alone. The ways and numbers of rows a step take turns. What
the engine does in between is the difference of the first two, and time of the threads that was not used. The third does
the same arithmetic on rows that are alike: if it is faster, the CPU's power is the limit, and not its instructions.

    python -m bench.prompt_batches [--batch 1,8,16] [--rows 512,1024] [--rounds 5]
"""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click
import torch

from specserve.compute.native.decoder import one_torch_thread
from specserve.config import EngineConfig
from specserve.engine.engine import Engine
from specserve.messages import GenerateRequest, SamplingParams, Speculation
from specserve.schedule.block_manager import BlockManager

from . import common, options
from .generation import generate
from .random_models import standing_sequences
from .tasks import BaseModel

FIRST_WORD = 512  # special tokens and single bytes stand before


@dataclass(slots=True)
class Figures:
    """Of one way, by round: tokens a second, and the share of the threads' time that was used."""

    tokens_per_s: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)

    def add(self, num_tokens: int, wall_s: float, cpu_s: float, threads: int) -> None:
        self.tokens_per_s.append(num_tokens / wall_s)
        self.busy.append(cpu_s / wall_s / threads)

    def record(self) -> dict[str, dict[str, float]]:
        return {"tokens_per_s": common.spread(self.tokens_per_s), "busy": common.spread(self.busy)}


class Batches:
    """One engine, and what it does with prompts of `length` tokens."""

    def __init__(self, base: BaseModel, length: int, most: int, threads: int, **settings: Any):
        self.threads, self._length = threads, length
        self._engine = Engine(
            EngineConfig(device="cpu", max_num_seqs=most, prefix_caching=False, num_threads=threads, speculation="off",
                         max_model_len=2 * length + 16, **settings),
            base.path,
        )  # fmt: skip
        self._words = range(FIRST_WORD, self._engine.info.vocab_size)
        self._random, self._ids = random.Random(0), itertools.count()

    def through_engine(self, batch: int, rows: int, figures: Figures) -> None:
        self._engine.scheduler.max_batched_tokens = rows
        sampling = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        requests = [
            GenerateRequest(
                f"{next(self._ids)}", self._random.choices(self._words, k=self._length), sampling,
                speculation=Speculation(mode="off"),
            )
            for _ in range(batch)
        ]  # fmt: skip
        cpu_s = time.process_time()
        _, wall_s = generate(self._engine, requests, batch)
        figures.add(batch * self._length, wall_s, time.process_time() - cpu_s, self.threads)

    def bare(self, batch: int, rows: int, figures: Figures, is_one_word: bool = False) -> None:
        total, runner = batch * self._length, self._engine.runner
        blocks = BlockManager(-(-rows // self._engine.info.block_size), self._engine.info.block_size, False)
        steps = [
            standing_sequences(blocks, 1, min(rows, total - first), 0, [], True) for first in range(0, total, rows)
        ]
        if not is_one_word:
            for (item,) in steps:
                item.seq.tokens[:] = self._random.choices(self._words, k=len(item.seq.tokens))
        with one_torch_thread():
            cpu_s, start = time.process_time(), time.perf_counter()
            for items in steps:
                runner.forward(items, {})
            wall_s = time.perf_counter() - start
        figures.add(total, wall_s, time.process_time() - cpu_s, self.threads)


@click.command(help=__doc__.partition("\n")[0])
@options.model
@options.numbers("--batch", "1,8,16", "Prompts at the same time.")
@options.numbers("--rows", "512,1024", "Rows of a step, at most.")
@options.at_least(1, "--prompt-tokens", 300, "Tokens of a prompt.")
@click.option("--threads", type=click.IntRange(1), help="Default: all cores.")
@options.rounds(5)
@options.save("prompt_batches")
@torch.inference_mode()
def main(
    model: str, batch: list[int], rows: list[int], prompt_tokens: int, threads: int | None, rounds: int, save: bool
) -> None:
    run = common.start("prompt_batches", "torch")
    num_threads = threads or common.num_cores()
    batches = Batches(BaseModel.load(model), prompt_tokens, max(batch), num_threads)
    ways: dict[str, Callable[[int, int, Figures], None]] = {
        "engine": batches.through_engine,
        "bare": batches.bare,
        "one word": functools.partial(batches.bare, is_one_word=True),
    }
    cases = list(itertools.product(batch, rows))
    figures = {case: {name: Figures() for name in ways} for case in cases}
    for round_idx in range(rounds + 1):
        for case in cases if round_idx % 2 else cases[::-1]:
            for name, way in ways.items():
                way(*case, figures[case][name] if round_idx else Figures())  # the first round warms up
    records = []
    for (num, most), found in figures.items():
        record: dict[str, Any] = {name: figures.record() for name, figures in found.items()}
        record |= {"batch": num, "rows": most}
        for name in ("engine", "one word"):
            pairs = zip(found[name].tokens_per_s, found["bare"].tokens_per_s, strict=True)
            record[f"{name} over bare"] = common.spread([a / b for a, b in pairs])
        shown = ", ".join(
            f"{name} {record[name]['tokens_per_s']['median']:.0f} tokens/s (busy {record[name]['busy']['median']:.2f})"
            for name in ways
        )
        over = [record[f"{name} over bare"]["median"] for name in ("engine", "one word")]
        click.echo(
            f"{num} prompts, steps of {most}: {shown}; engine / bare {over[0]:.3f}, one word / bare {over[1]:.3f}"
        )
        records.append(record)
    run.finish({"prompt_tokens": prompt_tokens, "threads": num_threads, "rounds": rounds, "cases": records}, save)


if __name__ == "__main__":
    main()
