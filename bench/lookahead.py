"""Do lookahead LoRAs answer faster than the same LoRAs without drafts, one at a time and mixed?

One engine, one process; each round answers the same held-out prompts without drafts and with, in an order that turns
from round to round. Batch 1 is measured for each adapter, larger batches over all of them in turn (adapter i answers
its own task's prompts). Greedy, EOS honoured. --data gives each adapter's held-out rows. The floor is printed
first: the milliseconds of a step that only reads the weights.

    python -m bench.lookahead ADAPTER_DIR ... --data FILE ... [--rounds 5] [--rows 16] [--batch 1,8]
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import click

from specserve.model.store import resolve_model
from specserve.text.special_tokens import eos_token_ids
from specserve.text.tokenizer import TextTokenizer
from specserve.training.answers import answer_mixed, make_engine
from specserve.training.dataset import read_rows, tokenize

from . import common

MODES = ("off", "auto")


@click.command(help=__doc__.partition("\n")[0])
@click.argument("adapters", nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--data", multiple=True, required=True, type=click.Path(exists=True, path_type=Path), help="One a adapter."
)
@click.option("--model", default="", help="Base model; default: specserve's default model.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--rows", type=click.IntRange(1), default=16, show_default=True, help="Prompts of each adapter.")
@click.option("--batch", default="1,8", show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=450, show_default=True)
@click.option("--save/--no-save", default=True, help="Append the result to bench/results/lookahead.jsonl.")
def main(
    adapters: tuple[Path, ...], data: tuple[Path, ...], model: str, rounds: int, rows: int, batch: str,
    max_tokens: int, save: bool,
) -> None:  # fmt: skip
    if len(adapters) != len(data):
        raise click.UsageError(f"{len(adapters)} adapters but {len(data)} --data files; give one for each")
    machine = common.hardware()
    click.echo(common.hardware_line(machine))
    model_dir = resolve_model(model)
    floor_ms = 1e3 * 2 * common.num_parameters(model_dir) / common.memory_bandwidth()
    click.echo(f"floor: a step that only reads the weights at 16 bits takes {floor_ms:.1f} ms")
    tokenizer, eos = TextTokenizer(model_dir), eos_token_ids(model_dir)
    batches = [int(size) for size in batch.split(",")]
    engine = make_engine(model_dir, batch=max(batches), max_len=2048)
    hashes = [engine.load_adapter(path.name, path).content_hash for path in adapters]
    prompts = [[e.prompt for e in tokenize(read_rows(file)[:rows], tokenizer, eos)] for file in data]
    cases: dict[str, tuple[int, list[tuple[str | None, list[int]]]]] = {}
    for size in batches:
        if size == 1:
            for path, key, own in zip(adapters, hashes, prompts, strict=True):
                cases[f"{path.name}, batch 1"] = (1, [(key, prompt) for prompt in own])
        else:
            mixed = [(key, own[idx]) for idx in range(rows) for key, own in zip(hashes, prompts, strict=True)]
            cases[f"mixed, batch {size}"] = (size, mixed)
    results: dict[str, dict[str, list[Any]]] = {name: {mode: [] for mode in MODES} for name in cases}
    for round_idx in range(rounds):
        for name, (size, requests) in cases.items():
            for mode in MODES if round_idx % 2 else MODES[::-1]:
                results[name][mode].append(answer_mixed(engine, requests, max_tokens, mode=mode, batch=size))
    figures = {}
    for name, modes in results.items():
        ratios = [
            (auto.num_tokens / auto.seconds) / (off.num_tokens / off.seconds)
            for off, auto in zip(modes["off"], modes["auto"], strict=True)
        ]
        decode = [
            (auto.decode_tokens / auto.decode_seconds) / (off.decode_tokens / off.decode_seconds)
            for off, auto in zip(modes["off"], modes["auto"], strict=True)
            if auto.decode_seconds and off.decode_seconds
        ]
        first_off, first = modes["off"][0], modes["auto"][0]
        same = [a.tokens == b.tokens for a, b in zip(first_off.answers, first.answers, strict=True)]
        figures[name] = {
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min_max": [round(min(ratios), 3), round(max(ratios), 3)],
            "decode_ratio": round(statistics.median(decode), 3) if decode else None,
            "tokens_per_s_off": round(statistics.median(r.num_tokens / r.seconds for r in modes["off"]), 1),
            "tokens_per_s_auto": round(statistics.median(r.num_tokens / r.seconds for r in modes["auto"]), 1),
            "mean_accepted_length": round(first.mean_accepted_length, 3),
            "accepted_by_source": dict(first.accepted_by_source),
            "answers_equal": round(sum(same) / len(same), 4),
        }
        click.echo(f"{name}: {figures[name]}")
    record = {
        "commit": common.commit(),
        "versions": common.versions("torch"),
        "hardware": machine,
        "model": model_dir.name,
        "dtype": engine.info.dtype,
        "rounds": rounds,
        "rows": rows,
        "max_tokens": max_tokens,
        "figures": figures,
    }
    if save:
        common.append_result("lookahead", record)


if __name__ == "__main__":
    main()
