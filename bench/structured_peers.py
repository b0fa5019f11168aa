"""Structured output with LoRAs: how many tokens a second, against vLLM's CPU build under the same JSON Schemas?

Both serve the same demo adapters (vLLM: the LoRA, specserve: with head and history) on the same held-out prompts,
greedy, every request under its task's schema, up to the end of its answer. The two take turns; a peer that does not
measure is stopped. Every answer that ended is validated with jsonschema. Tokens are each peer's own; prompts count.

    python -m bench.structured_peers --vllm-python PYTHON [--batch 1,8] [--rounds 3] [--tokens 128]
"""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import click
import jsonschema

from . import common, options
from .peers import vllm_cpu
from .peers.setup import Setup
from .peers.worker import Worker, make_request
from .tasks import EXAMPLES, BaseModel, demo_adapter, demo_rows, in_turn

TASKS = ("control2json", "debtags")
WANTED = {8: 6.0}


def check(answers: list[list[int]], schemas: list[str], tokenizer: Any, eos: set[int]) -> dict[str, int]:
    """How many answers that ended are valid against their schema."""
    counts = {"valid": 0, "out_of_tokens": 0, "invalid": 0}
    for tokens, schema in zip(answers, schemas, strict=True):
        ended = bool(tokens) and tokens[-1] in eos
        text = tokenizer.decode([token for token in tokens if token not in eos])
        try:
            jsonschema.validate(json.loads(text), json.loads(schema))
            counts["valid"] += 1
        except (ValueError, jsonschema.ValidationError):
            counts["invalid" if ended else "out_of_tokens"] += 1
    return counts


@click.command(help=__doc__.partition("\n")[0])
@click.option("--vllm-python", default=None, help="Python of an environment with vLLM; default: bench.peers' own.")
@options.numbers("--batch", "1,8")
@options.rounds(3)
@options.at_least(1, "--tokens", 128, "At most, an answer.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="bf16", show_default=True)
@click.option("--start-timeout", type=float, default=900.0, show_default=True)
@options.save("structured_peers")
def main(
    vllm_python: str | None, batch: list[int], rounds: int, tokens: int, dtype: str, start_timeout: float, save: bool
) -> None:
    run = common.start("structured_peers", "torch", "llguidance")
    base = BaseModel.load()
    common.print_floor(base.path)
    schemas = [(EXAMPLES / "data" / f"{task}.schema.json").read_text(encoding="utf-8") for task in TASKS]
    asked = in_turn([base.prompts(demo_rows(task)) for task in TASKS])
    figures: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        adapters = [str(demo_adapter(task)) for task in TASKS]
        setup = Setup(stack, base.path, adapters, start_timeout, vllm_python=vllm_cpu.find(vllm_python))
        if reason := setup.missing("vllm"):
            raise click.UsageError(f"vllm: {reason}")
        workers: dict[str, Worker] = {name: setup.start(name, dtype, with_lora=True) for name in ("specserve", "vllm")}
        tokenizer = _tokenizer(base.path)
        for size in batch:
            rates: dict[str, list[float]] = {name: [] for name in workers}
            valid: dict[str, list[dict[str, int]]] = {name: [] for name in workers}
            for round_idx in range(-1, rounds):  # the first warms up
                picked = list(itertools.islice(asked, size))
                request = make_request([p for _, p in picked], [task for task, _ in picked], tokens, "auto", False)
                request["schemas"] = [schemas[task] for task, _ in picked]
                for name in list(workers)[:: 1 if round_idx % 2 else -1]:
                    answer = workers[name].measure(request)
                    if round_idx < 0:
                        continue
                    rates[name].append(sum(map(len, answer["token_ids"])) / answer["wall_s"])
                    valid[name].append(check(answer["token_ids"], request["schemas"], tokenizer, set(base.eos)))
            ratios = [a / b for a, b in zip(rates["specserve"], rates["vllm"], strict=True)]
            figures[str(size)] = {
                "tokens_per_s": {name: common.spread(values) for name, values in rates.items()},
                "ratio": common.spread(ratios),
                "wanted": WANTED.get(size),
                "validity": {
                    name: {key: sum(counts[key] for counts in own) for key in own[0]} for name, own in valid.items()
                },
            }
            click.echo(f"batch {size}: {json.dumps(figures[str(size)])}")
        peers = {name: worker.info for name, worker in workers.items()}
    settings = {"peers": peers, "dtype": dtype, "rounds": rounds, "tokens": tokens}
    run.finish({**settings, "figures": figures}, save)


def _tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


if __name__ == "__main__":
    main()
