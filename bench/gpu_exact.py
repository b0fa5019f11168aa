"""On a GPU: how many greedy answers are the same, token by token, whatever runs beside them and with drafts?

The default model on held-out prompts: --num with the three demo adapters mixed, and half as many without an adapter.
Each is answered alone and without drafts first; then at other loads, without drafts, with those that pay (`auto`) and
with all that there are (`fixed`). Wanted: all the same, which --exact promises. Tokens a second stand beside.

    python -m bench.gpu_exact [--num 48] [--exact auto] [--device cuda]
"""

from __future__ import annotations

import gc
import itertools
from typing import Any

import click

from specserve.config import EngineConfig
from specserve.engine.engine import Engine
from specserve.training.evaluation.answers import answer_mixed

from . import common, options
from .tasks import DEMO_TASKS, BaseModel, demo_adapter, demo_rows, in_turn


@click.command(help=__doc__.partition("\n")[0])
@options.at_least(2, "--num", 48, "Requests with adapters.")
@options.at_least(1, "--max-tokens", 128)
@click.option("--exact", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option("--device", default="cuda", show_default=True)
@options.save("gpu_exact", default=False)
def main(num: int, max_tokens: int, exact: str, device: str, save: bool) -> None:
    run = common.start("gpu_exact", "torch", "triton", device=device)
    click.echo("limit: as many as were asked for")
    base = BaseModel.load()
    config = EngineConfig(
        model=str(base.path), device=device, exact=exact, max_num_seqs=max(num, 8), max_model_len=2048,
        max_waiting=100_000,
    )  # type: ignore[arg-type] # fmt: skip
    engine = Engine(config, base.path)
    gc.collect()
    gc.freeze()  # as the engine's process
    hashes = [engine.load_adapter(task, demo_adapter(task)).content_hash for task in DEMO_TASKS]
    prompts = [base.prompts(demo_rows(task)) for task in DEMO_TASKS]
    mixed = [(hashes[task], prompt) for task, prompt in itertools.islice(in_turn(prompts), num)]
    figures = {
        "adapters": of_requests(engine, mixed, max_tokens),
        "base": of_requests(engine, [(None, prompt) for _, prompt in mixed[: num // 2]], max_tokens),
    }
    run.finish({"exact": exact, "is_exact": engine.info.is_exact, "dtype": engine.info.dtype, "figures": figures}, save)


def of_requests(engine: Engine, requests: list[tuple[str | None, list[int]]], max_tokens: int) -> list[dict[str, Any]]:
    """The answers of each way against those alone without drafts."""
    num, first, figures = len(requests), None, []
    for mode, batch in (("off", 1), ("off", 8), ("off", num), ("auto", 1), ("auto", 8), ("auto", num), ("fixed", num)):
        done = answer_mixed(engine, requests, max_tokens, mode=mode, batch=batch)
        tokens = [answer.tokens for answer in done.answers]
        first = first or tokens
        same = sum(one == other for one, other in zip(tokens, first, strict=True))
        rate = round(done.num_tokens / done.seconds)
        figures.append({"mode": mode, "at_a_time": batch, "same": same, "of": num, "tokens_per_s": rate})
        click.echo(f"{mode:>5} at {batch:<3} {same} of {num} as alone without drafts; {rate} tokens/s")
    return figures


if __name__ == "__main__":
    main()
