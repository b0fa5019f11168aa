"""Does training the head jointly cost the LoRA quality?

For each seed the same LoRA is trained twice on the same rows in the same order for the same steps: once alone, once
with the head's gradient reaching into it (the defaults of `specserve train`). Compared on held-out rows: the mean
negative log-likelihood of the gold completions' tokens, which sees small differences, and the task metric of greedy
answers through the engine. The joint run must stay within one point of the other's task metric.

    python -m bench.joint_quality --data FILE --eval-data FILE [--seeds 3] [--first-seed 0] [--rows 300]
        [--eval-rows 60]
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import msgspec
import torch
import torch.nn.functional as F

from specserve.model.store import resolve_model
from specserve.text.special_tokens import eos_token_ids
from specserve.text.tokenizer import TextTokenizer
from specserve.training.answers import answer, make_engine
from specserve.training.batching import plan_epoch, plan_run
from specserve.training.dataset import Example, read_rows, tokenize
from specserve.training.head_module import LookaheadHead, common_prefix_len, task_vocab
from specserve.training.lora_model import LoraModel
from specserve.training.run_config import LoraConfig, OptimizerConfig, RunConfig
from specserve.training.task_metrics import task_metrics
from specserve.training.trainer import Trainer

from . import common


@torch.no_grad()
def held_out_loss(model: LoraModel, examples: list[Example], batch_tokens: int) -> float:
    model.peft.eval()
    total, num_tokens = 0.0, 0
    for batch in plan_epoch([len(e.tokens) for e in examples], batch_tokens, 0):
        hidden = model.hidden([examples[idx] for idx in batch])
        total += float(F.cross_entropy(model.logits(hidden.last).float(), hidden.targets, reduction="sum"))
        num_tokens += len(hidden.targets)
    model.peft.train()
    return total / num_tokens


def train(config: RunConfig, model_dir: Path, examples: list[Example], with_head: bool, directory: Path) -> LoraModel:
    torch.manual_seed(config.seed)
    model = LoraModel(model_dir, config.lora, torch.float32, torch.device("cpu"), None)
    head = None
    if with_head:
        vocab = task_vocab(examples, config.head.vocab_size)
        head = LookaheadHead(model.hidden_size, config.head.hidden_size, vocab, config.head.copy_window)
    plan = plan_run([len(e.tokens) for e in examples], config.optimizer.batch_tokens, config.seed, 1.0, None)
    directory.mkdir(parents=True)
    Trainer(config, model, head, examples, plan, common_prefix_len(examples), directory, {}).run()
    model.save(directory, model_dir.name)
    return model


@click.command(help=__doc__.partition("\n")[0])
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--eval-data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--model", "model_name", default="", help="Base model; default: specserve's default model.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many.")
@click.option("--first-seed", type=click.IntRange(0), default=0, show_default=True, help="To add seeds to a past run.")
@click.option("--rows", type=click.IntRange(1), default=300, show_default=True, help="Training rows.")
@click.option("--eval-rows", type=click.IntRange(1), default=60, show_default=True)
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True)
@click.option("--batch-tokens", type=click.IntRange(64), default=1024, show_default=True)
@click.option("--save/--no-save", default=True, help="Append the result to bench/results/joint_quality.jsonl.")
def main(
    data: Path, eval_data: Path, model_name: str, seeds: int, first_seed: int, rows: int, eval_rows: int, rank: int,
    batch_tokens: int, save: bool,
) -> None:  # fmt: skip
    machine = common.hardware()
    click.echo(common.hardware_line(machine))
    model_dir = resolve_model(model_name)
    tokenizer, eos = TextTokenizer(model_dir), eos_token_ids(model_dir)
    examples = tokenize(read_rows(data)[:rows], tokenizer, eos)
    held_out = tokenize(read_rows(eval_data)[:eval_rows], tokenizer, eos)
    gold = [tokenizer.decode(example.completion, skip_special_tokens=True) for example in held_out]
    config = RunConfig(
        output="bench",
        lora=LoraConfig(r=rank, alpha=2 * rank),
        optimizer=OptimizerConfig(batch_tokens=batch_tokens),
    )
    results: dict[str, list[dict[str, Any]]] = {"alone": [], "joint": []}
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(first_seed, first_seed + seeds):
            for name, values in results.items():
                directory = Path(temporary) / f"{name}-{seed}"
                run = msgspec.structs.replace(config, seed=seed)
                model = train(run, model_dir, examples, name == "joint", directory)
                loss = held_out_loss(model, held_out, batch_tokens)
                del model
                engine = make_engine(model_dir, batch=16, max_len=2048)
                key = engine.load_adapter(name, directory).content_hash
                texts = [a.text for a in answer(engine, key, [e.prompt for e in held_out], 450, batch=16).answers]
                del engine
                values.append({"seed": seed, "held_out_loss": round(loss, 4), **task_metrics(texts, gold)})
                click.echo(f"{name}: {values[-1]}")
    differences = [j["main"] - a["main"] for a, j in zip(results["alone"], results["joint"], strict=True)]
    record = {
        "commit": common.commit(),
        "versions": common.versions("torch", "transformers", "peft"),
        "hardware": machine,
        "data": data.name,
        "rows": rows,
        "eval_rows": eval_rows,
        "rank": rank,
        "batch_tokens": batch_tokens,
        "results": results,
        "joint_minus_alone": {"mean": round(statistics.mean(differences), 4), "seeds": differences},
    }
    click.echo(f"joint minus alone, task metric: {record['joint_minus_alone']}")
    if save:
        common.append_result("joint_quality", record)


if __name__ == "__main__":
    main()
