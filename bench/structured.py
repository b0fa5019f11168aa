"""Does a grammar make decoding faster, what do its masks cost, and is every output valid?

One engine, one process; each round answers the same held-out prompts in every way, in an order that turns from round
to round: `free` (drafts, no grammar), `grammar` (drafts and forced spans under the task's JSON Schema) and `no spans`
(the same grammar, forced spans not drafted). Each adapter is measured with its lookahead head and history, and as a
LoRA alone, where drafts come from the prompt only. Greedy. Ratios are of tokens a second, round by round. Then
--valid-rows rows are answered under the grammar at temperatures 0 and 1 and every output is validated; one that ran
out of tokens counts apart.

    python -m bench.structured ADAPTER_DIR ... --data FILE ... --schema FILE ... [--rounds 5] [--rows 16] [--batch 1,8]
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jsonschema

from specserve.drafters.grammar_source import GrammarSource
from specserve.engine.engine import Engine
from specserve.messages import GenerateRequest, GrammarSpec, SamplingParams
from specserve.training.evaluation.answers import make_engine

from . import common, options
from .generation import Output, generate
from .tasks import BaseModel

WAYS = ("free", "grammar", "no spans")
FILES = {"adapter_config.json", "adapter_model.safetensors"}  # of a LoRA alone


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over the prompts of a case."""

    outputs: list[Output]
    seconds: float
    mask_seconds: float

    @property
    def texts(self) -> list[str]:
        return [output.text for output in self.outputs]

    @property
    def rate(self) -> float:
        return sum(output.usage.completion_tokens for output in self.outputs) / self.seconds

    @property
    def tokens_per_forward(self) -> float:
        usages = [output.usage for output in self.outputs]
        return sum(usage.completion_tokens for usage in usages) / sum(usage.num_forwards for usage in usages)

    @property
    def accepted_by_source(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for output in self.outputs:
            total.update(output.usage.accepted_by_source)
        return total


def answer_all(
    engine: Engine, key: str, prompts: Sequence[list[int]], spec: GrammarSpec | None, batch: int, max_tokens: int,
    temperature: float = 0.0,
) -> Pass:  # fmt: skip
    """Answer all prompts, `batch` at a time."""
    requests = [
        GenerateRequest(
            str(idx), prompt, SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=idx),
            adapter_hash=key, cache_salt="", grammar=spec,
        )
        for idx, prompt in enumerate(prompts)
    ]  # fmt: skip
    before = engine.masks.seconds
    outputs, seconds = generate(engine, requests, batch)
    return Pass(outputs, seconds, engine.masks.seconds - before)


@contextmanager
def spans_drafted(way: str) -> Iterator[None]:
    """Without forced spans for the way that has none."""
    peek = GrammarSource.peek
    if way == "no spans":
        GrammarSource.peek = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        GrammarSource.peek = peek  # type: ignore[method-assign]


def check(made: Pass, schema: Any) -> dict[str, int]:
    """How many outputs satisfy the schema; an invalid one is printed."""
    counts = {"valid": 0, "out_of_tokens": 0, "invalid": 0}
    for output in made.outputs:
        if output.finish_reason != "stop":
            counts["out_of_tokens"] += 1
            continue
        try:
            jsonschema.validate(json.loads(output.text), schema)
            counts["valid"] += 1
        except (ValueError, jsonschema.ValidationError) as error:
            counts["invalid"] += 1
            click.echo(f"invalid: {output.text[:300]!r}: {error}")
    return counts


@click.command(help=__doc__.partition("\n")[0])
@options.adapters
@options.for_each_adapter("--data")
@options.for_each_adapter("--schema")
@options.model
@options.rounds(5)
@options.at_least(1, "--rows", 16, "Prompts that are timed.")
@options.at_least(0, "--valid-rows", 300, "Prompts validated.")
@options.numbers("--batch", "1,8")
@options.at_least(1, "--max-tokens", 600)
@options.save("structured")
def main(
    adapters: tuple[Path, ...], data: tuple[Path, ...], schema: tuple[Path, ...], model: str, rounds: int, rows: int,
    valid_rows: int, batch: list[int], max_tokens: int, save: bool,
) -> None:  # fmt: skip
    options.check_one_each(adapters, data=data, schema=schema)
    run = common.start("structured", "torch", "llguidance")
    base = BaseModel.load(model)
    engine = make_engine(base.path, batch=max(8, *batch), max_len=2048)
    floor_ms = 1e3 * engine.proposer.cost_model.seconds(1)
    click.echo(f"floor: a step of one row takes {floor_ms:.1f} ms")
    figures: dict[str, Any] = {}
    valid: dict[str, Any] = {}
    for path, file, schema_file in zip(adapters, data, schema, strict=True):
        text = schema_file.read_text(encoding="utf-8")
        spec, rules = GrammarSpec("json_schema", text), json.loads(text)
        prompts = base.prompts(file)
        full = engine.load_adapter(path.name, path).content_hash
        with tempfile.TemporaryDirectory() as folder:
            for name in FILES:
                (Path(folder) / name).write_bytes((path / name).read_bytes())
            alone = engine.load_adapter(f"{path.name}-lora", folder).content_hash
        for size in batch:
            for key, kind in ((full, "lookahead"), (alone, "LoRA alone")):
                name = f"{path.name}, {kind}, batch {size}"
                figures[name] = measure(engine, key, prompts[:rows], spec, rules, size, rounds, max_tokens)
                click.echo(f"{name}: {figures[name]}")
        for temperature in (0.0, 1.0) if valid_rows else ():
            made = answer_all(engine, full, prompts[:valid_rows], spec, max(batch), max_tokens, temperature)
            name = f"{path.name}, temperature {temperature:g}"
            valid[name] = check(made, rules)
            click.echo(f"{name}: {valid[name]}")
    settings = {"dtype": engine.info.dtype, "rounds": rounds, "rows": rows}
    run.finish({**settings, "figures": figures, "validity": valid}, save)


def measure(
    engine: Engine, key: str, prompts: list[list[int]], spec: GrammarSpec, rules: Any, batch: int, rounds: int,
    max_tokens: int,
) -> dict[str, Any]:  # fmt: skip
    runs: dict[str, list[Pass]] = {way: [] for way in WAYS}
    for round_idx in range(-1, rounds):  # the first warms up what is learned, and does not count
        for way in WAYS if round_idx % 2 else WAYS[::-1]:
            with spans_drafted(way):
                run = answer_all(engine, key, prompts, None if way == "free" else spec, batch, max_tokens)
            if round_idx >= 0:
                runs[way].append(run)
    same = [a == b for a, b in zip(runs["free"][0].texts, runs["grammar"][0].texts, strict=True)]

    def ratio(one: str, other: str) -> dict[str, float]:
        return common.spread([a.rate / b.rate for a, b in zip(runs[one], runs[other], strict=True)])

    return {
        "grammar_over_free": ratio("grammar", "free"),
        "grammar_over_no_spans": ratio("grammar", "no spans"),
        "answers_a_second_over_free": common.spread(
            [a.seconds / b.seconds for a, b in zip(runs["free"], runs["grammar"], strict=True)]
        ),
        "mask_share": round(max(run.mask_seconds / run.seconds for run in runs["grammar"]), 5),
        "texts_equal_to_free": round(sum(same) / len(same), 3),
        "valid_free": check_quietly(runs["free"][0], rules),
        "valid_grammar": check_quietly(runs["grammar"][0], rules),
        "ways": {
            way: {
                "tokens_per_s": round(statistics.median(run.rate for run in own), 1),
                "tokens_per_forward": round(own[-1].tokens_per_forward, 3),
                "accepted_by_source": dict(own[-1].accepted_by_source),
            }
            for way, own in runs.items()
        },
    }


def check_quietly(run: Pass, rules: Any) -> float:
    """Share of outputs that satisfy the schema."""
    num = 0
    for text in run.texts:
        try:
            jsonschema.validate(json.loads(text), rules)
            num += 1
        except (ValueError, jsonschema.ValidationError):
            pass
    return round(num / len(run.texts), 3)


if __name__ == "__main__":
    main()
