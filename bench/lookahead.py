"""Do lookahead LoRAs answer faster than the same LoRAs without drafts, one at a time and mixed?

One engine, one process; each round answers the same held-out prompts without drafts and with, in an order that turns
from round to round. Batch 1 is measured for each adapter, larger batches over all of them in turn (adapter i answers
its own task's prompts). Greedy, EOS honoured. --data gives each adapter's held-out rows. The floor is printed
first: the milliseconds of a step that only reads the weights.

    python -m bench.lookahead ADAPTER_DIR ... --data FILE ... [--rounds 5] [--rows 16] [--batch 1,8]
"""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import click

from specserve.training.evaluation.answers import Answers, answer_mixed, make_engine

from . import common, options
from .tasks import BaseModel, in_turn

MODES = ("off", "auto")
Requests = list[tuple[str, list[int]]]  # (adapter hash, prompt)


@click.command(help=__doc__.partition("\n")[0])
@options.adapters
@options.for_each_adapter("--data")
@options.model
@options.rounds(5)
@options.at_least(1, "--rows", 16, "Prompts of each adapter.")
@options.numbers("--batch", "1,8")
@options.at_least(1, "--max-tokens", 450)
@options.save("lookahead")
def main(
    adapters: tuple[Path, ...], data: tuple[Path, ...], model: str, rounds: int, rows: int, batch: list[int],
    max_tokens: int, save: bool,
) -> None:  # fmt: skip
    options.check_one_each(adapters, data=data)
    run = common.start("lookahead", "torch")
    base = BaseModel.load(model)
    common.print_floor(base.path)
    engine = make_engine(base.path, batch=max(batch), max_len=2048)
    hashes = [engine.load_adapter(path.name, path).content_hash for path in adapters]
    prompts = [base.prompts(file, rows) for file in data]
    cases: dict[str, tuple[int, Requests]] = {}
    for size in batch:
        if size == 1:
            for path, key, own in zip(adapters, hashes, prompts, strict=True):
                cases[f"{path.name}, batch 1"] = (1, [(key, prompt) for prompt in own])
        else:
            mixed = itertools.islice(in_turn(prompts), rows * len(prompts))
            cases[f"mixed, batch {size}"] = (size, [(hashes[task], prompt) for task, prompt in mixed])
    results: dict[str, dict[str, list[Answers]]] = {name: {mode: [] for mode in MODES} for name in cases}
    for round_idx in range(rounds):
        for name, (size, requests) in cases.items():
            for mode in MODES if round_idx % 2 else MODES[::-1]:
                results[name][mode].append(answer_mixed(engine, requests, max_tokens, mode=mode, batch=size))
    figures = {}
    for name, modes in results.items():
        figures[name] = figures_of(modes["off"], modes["auto"])
        click.echo(f"{name}: {figures[name]}")
    settings = {"rounds": rounds, "rows": rows, "max_tokens": max_tokens}
    run.finish({"model": base.name, "dtype": engine.info.dtype, **settings, "figures": figures}, save)


def figures_of(all_off: list[Answers], all_auto: list[Answers]) -> dict[str, Any]:
    """One case, a value of each mode a round; what is no time is the same in every round and taken from the first."""
    pairs = list(zip(all_off, all_auto, strict=True))
    ratios = [(auto.num_tokens / auto.seconds) / (off.num_tokens / off.seconds) for off, auto in pairs]
    decode = [
        (auto.decode_tokens / auto.decode_seconds) / (off.decode_tokens / off.decode_seconds)
        for off, auto in pairs
        if auto.decode_seconds and off.decode_seconds
    ]
    off, auto = pairs[0]
    same = [a.tokens == b.tokens for a, b in zip(off.answers, auto.answers, strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
        "decode_ratio": round(statistics.median(decode), 3) if decode else None,
        "tokens_per_s_off": round(statistics.median(r.num_tokens / r.seconds for r in all_off), 1),
        "tokens_per_s_auto": round(statistics.median(r.num_tokens / r.seconds for r in all_auto), 1),
        "mean_accepted_length": round(auto.mean_accepted_length, 3),
        "accepted_by_source": dict(auto.accepted_by_source),
        "answers_equal": round(sum(same) / len(same), 4),
    }


if __name__ == "__main__":
    main()
