"""What does an engine's decoding step take beside its forward, and beside the model's kernels?

Random prompts of one length, all at once; of the steps in which every sequence decodes, the median of whole steps, and
of the forward within the same steps (batch, kernels and what is between), so that a machine that does other work slows
both. On the native path the kernels' own clocks are the limit that is shown. Logits, sampling, committing, scheduling
and events are what a step has beside these. --temperature and --top-p draw; --cpu-time needs --threads 1 and counts the
thread's own time, kernels apart.

    python -m bench.engine_steps [--batch 1,8,16] [--prompt-tokens 300] [--tokens 60] [--rounds 5]
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import click

from specserve.config import EngineConfig
from specserve.engine.engine import Engine
from specserve.messages import GenerateRequest, SamplingParams, Speculation

from . import common, options
from .prompt_batches import FIRST_WORD
from .tasks import BaseModel


class Steps:
    """One engine whose forwards are timed by `clock`; `sampling` is what requests ask for."""

    def __init__(
        self, base: BaseModel, length: int, threads: int, sampling: SamplingParams, clock: Callable[[], float]
    ):
        self._engine = engine = Engine(
            EngineConfig(device="cpu", prefix_caching=False, num_threads=threads, speculation="off",
                         max_model_len=length + sampling.max_tokens + 16),
            base.path,
        )  # fmt: skip
        self._length, self._sampling, self._clock = length, sampling, clock
        self._random, self._ids = random.Random(0), itertools.count()
        self._words = range(FIRST_WORD, engine.info.vocab_size)
        self._forward_s, forward = 0.0, engine.runner.forward

        def timed(*args: Any) -> Any:
            start = clock()
            try:
                return forward(*args)
            finally:
                self._forward_s = clock() - start

        engine.runner.forward = timed  # type: ignore[method-assign]

    def of(self, batch: int) -> list[tuple[float, float, float]]:
        """Seconds of each step in which all of a batch decode: whole, of its forward, and by the kernels' clocks."""
        engine, found = self._engine, []
        for _ in range(batch):
            words = self._random.choices(self._words, k=self._length)
            engine.add_request(
                GenerateRequest(f"{next(self._ids)}", words, self._sampling, speculation=Speculation(mode="off"))
            )
        clocks = getattr(engine.decoder, "clocks", dict)
        while engine.has_work():
            before, start = sum(clocks().values()), self._clock()
            num_rows = len(engine.step())
            step_s = self._clock() - start
            if num_rows == batch:
                found.append((step_s, self._forward_s, sum(clocks().values()) - before))
        return found[1:]  # the first may end a prompt


@click.command(help=__doc__.partition("\n")[0])
@options.model
@options.numbers("--batch", "1,8,16", "Sequences at the same time.")
@options.at_least(1, "--prompt-tokens", 300, "Tokens before the first step.")
@options.at_least(3, "--tokens", 60, "Tokens that each sequence gets.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="Default: all cores.")
@click.option("--cpu-time", is_flag=True, help="The thread's own time instead of the clock's; needs --threads 1.")
@options.rounds(5)
@options.save("engine_steps", default=False)
def main(
    model: str, batch: list[int], prompt_tokens: int, tokens: int, temperature: float, top_p: float,
    threads: int | None, cpu_time: bool, rounds: int, save: bool,
) -> None:  # fmt: skip
    if cpu_time and threads != 1:
        raise click.UsageError("--cpu-time is the time of one thread; add --threads 1")
    run = common.start("engine_steps", "torch")
    num_threads = threads or common.num_cores()
    sampling = SamplingParams(
        max_tokens=tokens, temperature=temperature, top_p=top_p, seed=0, ignore_eos=True, detokenize=False
    )
    clock = time.thread_time if cpu_time else time.perf_counter
    steps = Steps(BaseModel.load(model), prompt_tokens, num_threads, sampling, clock)
    rounds_of: dict[int, list[list[tuple[float, float, float]]]] = {num: [] for num in batch}
    for round_idx in range(rounds + 1):
        for num in batch:
            found = steps.of(num)
            if not found:
                raise click.UsageError(f"no step has all of {num} sequences: give --tokens more than {tokens}")
            if round_idx:  # the first round warms up
                rounds_of[num].append(found)
    cases: list[dict[str, Any]] = []
    for num, found in rounds_of.items():
        medians = [[statistics.median(column) for column in zip(*own, strict=True)] for own in found]
        whole, forward, kernels = ([1e3 * own[idx] for own in medians] for idx in range(3))
        case = {
            "batch": num,
            "ms": common.spread(whole),
            "forward_ms": common.spread(forward),
            "kernels_ms": common.spread(kernels),
            "step_over_forward": common.spread([a / b for a, b in zip(whole, forward, strict=True)]),
        }
        if cpu_time:
            del case["kernels_ms"]  # by the machine's clock
        else:
            click.echo(f"limit: the kernels of {num} sequences take {case['kernels_ms']['median']:.2f} ms")
        shown = [case[name]["median"] for name in ("ms", "forward_ms", "step_over_forward")]
        click.echo("{} sequences: step {:.2f} ms, its forward {:.2f}, {:.3f} times that".format(num, *shown))
        cases.append(case)
    fields = {"prompt_tokens": prompt_tokens, "tokens": tokens, "temperature": temperature, "top_p": top_p}
    run.finish({**fields, "threads": num_threads, "cpu_time": cpu_time, "rounds": rounds, "cases": cases}, save)


if __name__ == "__main__":
    main()
