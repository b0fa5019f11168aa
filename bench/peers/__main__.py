"""How many tokens a second does specserve give on this CPU, next to what people would use instead?

Peers: transformers + peft, vLLM's CPU build, and llama.cpp if asked for. Each is a worker process that loads once,
warms up, and then answers one measurement at a time; the others are stopped (SIGSTOP) meanwhile. Every round asks every
peer for the same prompts, the same adapters and the same number of greedy tokens, in turn, so that ratios within a
round survive a machine that slows down. Prefix caching is off for all. The floor is the weights' bytes over a measured
read rate. --setup makes vLLM's environment; llama.cpp needs --llamacpp-python, of an environment with llama-cpp-python,
and --gguf.

With --prompt-tokens 300 the first two kinds of case begin with random prompts of that length, and others like them are
measured with one token more, so that prompts have a rate of their own (--tokens 33 is enough then).

With --task ADAPTER_DIR:ROWS.jsonl (once a task) there is a third kind of case: requests take turns over finished LoRAs
and answer held-out prompts of their own tasks up to the end of the answer, as their users would have them; specserve
does so without drafts and with, through each LoRA's lookahead head; the others load the LoRA alone.

    python -m bench.peers [--rounds 5] [--batch 1,8,16] [--tokens 100] [--peers specserve,transformers,vllm]
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import click

from .. import common, options
from ..tasks import BaseModel, chat_token_ids, read_prompts
from . import vllm_cpu
from .cases import Prompts, interleaved
from .columns import PEERS, start_peers
from .random_adapters import RANK, adapter_folders
from .setup import Setup
from .table import report

FIRST_WORD = 512  # of random prompts: special tokens and single bytes stand before


def print_limit(model_dir: Path) -> dict[str, Any]:
    floor = common.WeightFloor.measured(model_dir)
    limit = {"read_gb_per_s": round(floor.bytes_per_s / 1e9, 2), "parameters": floor.num_params}
    for name, bits in (("fp32", 32), ("16 bit", 16)):
        limit[f"floor_ms_{name.replace(' ', '')}"] = round(floor.ms(bits), 2)
        print(
            f"limit, {name}: {floor.num_bytes(bits) / 1e6:.0f} MB of weights at {floor.bytes_per_s / 1e9:.1f} GB/s: "
            f"{floor.ms(bits):.1f} ms a step, so at most {1e3 / floor.ms(bits):.0f} tokens/s at batch 1"
        )
    return limit


def read_task(task: str, base: BaseModel) -> tuple[str, list[list[int]]]:
    """An adapter's folder and its task's prompts, of ADAPTER_DIR:ROWS."""
    folder, _, rows = task.rpartition(":")
    if not Path(folder, "adapter_config.json").is_file() or not Path(rows).is_file():
        raise click.BadParameter(f"--task {task}: an adapter's folder, a colon and a file of rows are expected")
    return str(Path(folder).resolve()), base.prompts(Path(rows))


@click.command(help=__doc__.partition("\n")[0])
@options.model
@options.rounds(5)
@options.numbers("--batch", "1,8,16", "Requests at the same time.")
@options.at_least(1, "--tokens", 100, "Output tokens of each request.")
@options.at_least(0, "--prompt-tokens", 0, "Random prompts of this length, timed apart; 0: bench/data's prompts.")
@click.option("--peers", "names", default="specserve,transformers,vllm", show_default=True)
@click.option("--task", "tasks", multiple=True, metavar="ADAPTER_DIR:ROWS", help="A finished LoRA and held-out rows.")
@click.option("--quantization", multiple=True, type=click.Choice(["int8", "int4"]), help="More specserve columns.")
@click.option("--dtypes", default="fp32,bf16", show_default=True, help="Tried for transformers and vLLM; faster wins.")
@click.option("--drafts/--no-drafts", default=True, show_default=True, help="A second specserve column, with drafts.")
@click.option("--vllm-python", envvar="SPECSERVE_BENCH_VLLM_PYTHON", help="Python of an environment with vLLM.")
@click.option("--llamacpp-python", envvar="SPECSERVE_BENCH_LLAMACPP_PYTHON", help="The same with llama-cpp-python.")
@click.option("--gguf", multiple=True, help="The model as a GGUF file, for llama.cpp; a column each.")
@click.option("--start-timeout", default=1200.0, show_default=True, help="Seconds a peer may take to start.")
@click.option("--setup", "set_up", is_flag=True, help="First make vLLM's environment in the cache, where it lacks.")
@options.save("peers")
def main(
    model: str, rounds: int, batch: list[int], tokens: int, prompt_tokens: int, names: str, tasks: tuple[str, ...],
    quantization: tuple[str, ...], dtypes: str, drafts: bool, vllm_python: str | None, llamacpp_python: str | None,
    gguf: tuple[str, ...], start_timeout: float, set_up: bool, save: bool,
) -> None:  # fmt: skip
    from transformers import AutoTokenizer

    wanted = names.split(",")
    if unknown := set(wanted) - set(PEERS):
        raise click.BadParameter(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
    run = common.start("peers", "torch", "transformers", "peft")
    base = BaseModel.load(model)
    limit = print_limit(base.path)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    prompts = [chat_token_ids(tokenizer, row["prompt"]) for row in read_prompts()]
    own = [read_task(task, base) for task in tasks]
    with contextlib.ExitStack() as stack:
        setup = Setup(
            stack=stack,
            model_dir=base.path,
            adapters=adapter_folders(base.path) + [folder for folder, _ in own],
            start_timeout_s=start_timeout,
            vllm_python=vllm_cpu.set_up() if set_up and not vllm_python else vllm_cpu.find(vllm_python),
            llamacpp_python=llamacpp_python,
            ggufs=gguf,
            prompts=prompts,
            dtypes=dtypes.split(","),
            quantizations=quantization,
        )
        peers, left_out = start_peers(setup, wanted, drafts)
        if not peers:
            raise click.ClickException("no peer runs")
        words = range(FIRST_WORD, len(tokenizer))
        cells = interleaved(
            peers,
            batch,
            Prompts(prompts, prompt_tokens, words),
            [task_prompts for _, task_prompts in own],
            tokens,
            rounds,
        )
    summary = report(cells, peers)
    plain = {peer.name: peer.plain.info for peer in peers if peer.mode == "off"}
    fields = {
        "versions": run.versions | {name: info["version"] for name, info in plain.items()},
        "model": base.name,
        "settings": {
            "rounds": rounds,
            "tokens": tokens,
            "prompt_tokens": prompt_tokens,
            "rank": RANK,
            "prefix_caching": False,
            "dtypes": {peer.name: peer.dtype for peer in peers},
            "start_s": {name: info["start_s"] for name, info in plain.items()},
        },
        "limit": limit,
        "probes": setup.probes,
        "left_out": left_out,
        "cells": summary,
    }
    run.finish(fields, save)


if __name__ == "__main__":
    main()
