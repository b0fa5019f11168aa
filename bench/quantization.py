"""What do int8 and int4 weights cost in quality and bring in speed, on the tasks of finished LoRAs?

Per format: perplexity of the base model on the tasks' gold completions (prompt given), perplexity and task metric of
each LoRA on the same base, held-out rows, greedy; tokens/s of the same answers without drafts, one at a time and eight
at a time, formats in turn within a round (--rounds 0: quality alone, which other work on the machine does not touch).
The floor is printed first: bytes of the weights over a measured read rate. What single steps take says bench.cpu_steps.

    python -m bench.quantization ADAPTER_DIR ... --data FILE ... [--rows 40] [--rounds 3] [--format int8]
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import click

from specserve.config import EngineConfig
from specserve.engine.engine import Engine
from specserve.messages import GenerateRequest, SamplingParams, Speculation
from specserve.model.config import ModelConfig
from specserve.training.data.dataset import Example
from specserve.training.evaluation.answers import answer
from specserve.training.evaluation.task_metrics import task_metrics

from . import common, options
from .cpu_cases import BITS, Case
from .generation import generate
from .tasks import BaseModel


def mean_log_prob(engine: Engine, adapter: str | None, examples: list[Example]) -> float:
    """Mean log-probability of the completions' tokens, teacher forced."""
    requests = [
        GenerateRequest(
            f"score-{idx}", example.tokens, SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0),
            adapter_hash=adapter, cache_salt=f"{idx}", speculation=Speculation("off", 1),
        )
        for idx, example in enumerate(examples)
    ]  # fmt: skip
    outputs, _ = generate(engine, requests, batch=1)
    pairs = zip(outputs, examples, strict=True)
    scores = [score for output, example in pairs for score in output.prompt_logprobs[len(example.prompt) :]]
    return sum(score.logprob for score in scores if score is not None) / len(scores)


@click.command(help=__doc__.partition("\n")[0])
@options.adapters
@options.for_each_adapter("--data")
@options.model
@options.at_least(1, "--rows", 40, "Held-out rows of each task.")
@options.at_least(0, "--rounds", 3, "Of timed runs.")
@click.option("--format", "formats", multiple=True, type=click.Choice(list(BITS)), default=list(BITS))
@options.at_least(1, "--speed-rows", 8, "Rows of each timed run.")
@options.at_least(1, "--max-tokens", 450)
@options.save("quantization")
def main(
    adapters: tuple[Path, ...], data: tuple[Path, ...], model: str, rows: int, rounds: int, formats: tuple[str, ...],
    speed_rows: int, max_tokens: int, save: bool,
) -> None:  # fmt: skip
    options.check_one_each(adapters, data=data)
    run = common.start("quantization", "torch")
    base = BaseModel.load(model)
    floor = common.WeightFloor.measured(base.path)
    config = ModelConfig.from_dir(base.path)
    for name in formats:
        ms = 1e3 * Case(1, 1, 0).num_bytes(config, BITS[name], 0) / floor.bytes_per_s
        click.echo(f"floor, {name}: {ms:.2f} ms a step at batch 1")
    tasks = [base.examples(file, rows) for file in data]
    engines = {
        name: Engine(
            EngineConfig(
                model=str(base.path), device="cpu", quantization=name,  # type: ignore[arg-type]
                max_num_seqs=16, kv_cache_gib=0.5, max_waiting=10**5,
            ),
            base.path,
        )
        for name in formats
    }  # fmt: skip
    figures: dict[str, dict[str, Any]] = {}
    hashes = {}
    for name, engine in engines.items():
        hashes[name] = [engine.load_adapter(path.name, path).content_hash for path in adapters]
        figures[name] = {"tasks": {}}
        for path, key, examples in zip(adapters, hashes[name], tasks, strict=True):
            gold = [base.tokenizer.decode(example.completion, skip_special_tokens=True) for example in examples]
            answers = answer(engine, key, [example.prompt for example in examples], max_tokens, batch=16).answers
            figures[name]["tasks"][path.name] = {
                "perplexity_base": round(math.exp(-mean_log_prob(engine, None, examples)), 4),
                "perplexity": round(math.exp(-mean_log_prob(engine, key, examples)), 4),
                **{key: round(value, 4) for key, value in task_metrics([a.text for a in answers], gold).items()},
            }
            click.echo(f"{name}, {path.name}: {figures[name]['tasks'][path.name]}")
    for batch in (1, 8) if rounds else ():
        rates: dict[str, list[float]] = {name: [] for name in formats}
        prompts = [example.prompt for example in tasks[0][:speed_rows]]
        for round_idx in range(rounds):
            for name in formats if round_idx % 2 else formats[::-1]:
                result = answer(engines[name], hashes[name][0], prompts, 64, mode="off", batch=batch)
                rates[name].append(result.decode_tokens / max(1e-9, result.decode_seconds))
        for name in formats:
            ratios = [a / b for a, b in zip(rates[name], rates[formats[0]], strict=True)]
            figures[name][f"decode_tokens_per_s_batch_{batch}"] = round(statistics.median(rates[name]), 1)
            figures[name][f"over_{formats[0]}_batch_{batch}"] = common.spread(ratios)
    click.echo(str({name: {k: v for k, v in f.items() if k != "tasks"} for name, f in figures.items()}))
    run.finish({"model": base.name, "rows": rows, "rounds": rounds, "figures": figures}, save)


if __name__ == "__main__":
    main()
