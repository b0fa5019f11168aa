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

from specserve.training.data.batching import plan_epoch, plan_run
from specserve.training.data.dataset import Example
from specserve.training.evaluation.answers import answer, make_engine
from specserve.training.evaluation.task_metrics import task_metrics
from specserve.training.head_fit import new_head
from specserve.training.head_module import common_prefix_len, task_vocab
from specserve.training.joint_loss import JointObjective
from specserve.training.lora_model import LoraModel
from specserve.training.run_config import LoraConfig, OptimizerConfig, RunConfig
from specserve.training.trainer import Trainer

from . import common, options
from .tasks import BaseModel

MAX_LOSS = 0.01


@torch.no_grad()
def held_out_loss(model: LoraModel, examples: list[Example], batch_tokens: int) -> float:
    model.train(False)
    total, num_tokens = 0.0, 0
    for batch in plan_epoch([len(e.tokens) for e in examples], batch_tokens, 0):
        hidden = model.hidden([examples[idx] for idx in batch])
        total += float(F.cross_entropy(model.logits(hidden.last).float(), hidden.targets, reduction="sum"))
        num_tokens += len(hidden.targets)
    model.train()
    return total / num_tokens


def train(config: RunConfig, model_dir: Path, examples: list[Example], with_head: bool, directory: Path) -> LoraModel:
    torch.manual_seed(config.seed)
    model = LoraModel(model_dir, config.lora, torch.float32, torch.device("cpu"), None)
    head = None
    if with_head:
        vocab = task_vocab(examples, config.head.vocab_size)
        head = new_head(model, config.head, vocab)
    plan = plan_run([len(e.tokens) for e in examples], config.optimizer.batch_tokens, config.seed, 1.0, None)
    directory.mkdir(parents=True)
    objective = JointObjective(config, model, head, examples, common_prefix_len(examples), len(plan))
    Trainer(config, objective, plan, directory, {}).train()
    model.save(directory, model_dir.name)
    return model


@click.command(help=__doc__.partition("\n")[0])
@options.file("--data")
@options.file("--eval-data")
@options.model
@options.at_least(1, "--seeds", 3, "How many.")
@options.at_least(0, "--first-seed", 0, "To add seeds to a past run.")
@options.at_least(1, "--rows", 300, "Training rows.")
@options.at_least(1, "--eval-rows", 60)
@options.at_least(1, "--rank", 8)
@options.at_least(64, "--batch-tokens", 1024)
@options.save("joint_quality")
def main(
    data: Path, eval_data: Path, model: str, seeds: int, first_seed: int, rows: int, eval_rows: int, rank: int,
    batch_tokens: int, save: bool,
) -> None:  # fmt: skip
    run = common.start("joint_quality", "torch", "transformers", "peft")
    base = BaseModel.load(model)
    click.echo(f"limit: joint may be {MAX_LOSS} of the task metric below alone")
    examples, held_out = base.examples(data, rows), base.examples(eval_data, eval_rows)
    gold = [base.tokenizer.decode(example.completion, skip_special_tokens=True) for example in held_out]
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
                seeded = msgspec.structs.replace(config, seed=seed)
                trained = train(seeded, base.path, examples, name == "joint", directory)
                loss = held_out_loss(trained, held_out, batch_tokens)
                del trained
                engine = make_engine(base.path, batch=16, max_len=2048)
                key = engine.load_adapter(name, directory).content_hash
                texts = [a.text for a in answer(engine, key, [e.prompt for e in held_out], 450, batch=16).answers]
                del engine
                values.append({"seed": seed, "held_out_loss": round(loss, 4), **task_metrics(texts, gold)})
                click.echo(f"{name}: {values[-1]}")
    differences = [j["main"] - a["main"] for a, j in zip(results["alone"], results["joint"], strict=True)]
    difference = {"mean": round(statistics.mean(differences), 4), "seeds": differences}
    click.echo(f"joint minus alone, task metric: {difference}")
    settings = {"data": data.name, "rows": rows, "eval_rows": eval_rows, "rank": rank, "batch_tokens": batch_tokens}
    run.finish({**settings, "results": results, "joint_minus_alone": difference}, save)


if __name__ == "__main__":
    main()
