"""Is a joint training step (LoRA and head) faster than a plain peft loop without a head?

Both train the same LoRA on the same rows on this machine, interleaved. The plain loop is what a first script does:
batches in the data's order padded to the longest row, transformers' own loss, so logits for every position. Ours takes
similar lengths together and makes logits only where there is loss; its head learns from the first step. Tokens are real
ones, padding not counted. The limit is what the machine's matrix products reach.

    python -m bench.train_speed --data FILE [--rounds 3] [--steps 3] [--batch-tokens 1024]
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import msgspec
import torch

from specserve.training.data.batching import plan_run
from specserve.training.data.dataset import Example
from specserve.training.head_fit import new_head
from specserve.training.head_module import common_prefix_len, task_vocab
from specserve.training.joint_loss import JointObjective
from specserve.training.lora_model import LINEARS, LoraModel
from specserve.training.run_config import JointConfig, LoraConfig, OptimizerConfig, RunConfig
from specserve.training.trainer import Trainer

from . import common, options
from .tasks import BaseModel


class PlainLoop:
    """transformers + peft as in their examples."""

    def __init__(self, model_dir: Path, rank: int, examples: list[Example], batch_tokens: int):
        import peft
        from transformers import AutoModelForCausalLM

        base: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEARS), task_type="CAUSAL_LM")
        self.model: Any = peft.get_peft_model(base, lora)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        mean = sum(len(e.tokens) for e in examples) / len(examples)
        self.batch_len = max(1, round(batch_tokens / mean))
        self.examples = examples
        self.position = 0

    def step(self) -> int:
        batch = [self.examples[(self.position + i) % len(self.examples)] for i in range(self.batch_len)]
        self.position += self.batch_len
        width = max(len(e.tokens) for e in batch)
        ids = torch.tensor([e.tokens + [0] * (width - len(e.tokens)) for e in batch])
        mask = torch.tensor([[1] * len(e.tokens) + [0] * (width - len(e.tokens)) for e in batch])
        labels = torch.tensor(
            [
                [t if m else -100 for t, m in zip(e.tokens, e.loss_mask, strict=True)]
                + [-100] * (width - len(e.tokens))
                for e in batch
            ]
        )
        self.optimizer.zero_grad()
        self.model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        self.optimizer.step()
        return sum(len(e.tokens) for e in batch)


def matmul_rate(size: int = 1024, repeats: int = 7) -> float:
    """Operations a second of a square fp32 product; the fastest repeat counts."""
    a, b, best = torch.randn(size, size), torch.randn(size, size), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@click.command(help=__doc__.partition("\n")[0])
@options.file("--data")
@options.model
@options.at_least(1, "--rank", 16)
@options.rounds(3)
@options.at_least(1, "--steps", 3, "Steps of each in a round.")
@options.at_least(64, "--batch-tokens", 1024)
@options.save("train_speed")
def main(data: Path, model: str, rank: int, rounds: int, steps: int, batch_tokens: int, save: bool) -> None:
    run = common.start("train_speed", "torch", "transformers", "peft")
    base = BaseModel.load(model)
    limit = matmul_rate() / (4 * common.num_parameters(base.path))  # 2 operations a weight forward, 2 back
    click.echo(f"limit: {limit:.0f} tokens/s if matrix products through the frozen weights were all")
    examples = base.examples(data)
    random.Random(0).shuffle(examples)
    config = RunConfig(
        lora=LoraConfig(r=rank, alpha=2 * rank),
        joint=JointConfig(start=0.0),
        optimizer=OptimizerConfig(batch_tokens=batch_tokens, lr=1e-4),
    )
    config = msgspec.structs.replace(config, output="bench")
    lora = LoraModel(base.path, config.lora, torch.float32, torch.device("cpu"), None)
    vocab = task_vocab(examples, config.head.vocab_size)
    head = new_head(lora, config.head, vocab)
    plan = plan_run([len(e.tokens) for e in examples], batch_tokens, 0, 1, None)
    objective = JointObjective(config, lora, head, examples, common_prefix_len(examples), len(plan))
    plain = PlainLoop(base.path, rank, examples, batch_tokens)
    rates: dict[str, list[float]] = {"plain": [], "joint": []}
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(config, objective, plan, Path(directory), {})
        plain.step()
        trainer.train_step()
        for _ in range(rounds):
            for name in ("plain", "joint"):
                start, tokens = time.perf_counter(), 0
                for _ in range(steps):
                    tokens += plain.step() if name == "plain" else trainer.train_step()["tokens"]
                rates[name].append(tokens / (time.perf_counter() - start))
    ratios = [joint / other for joint, other in zip(rates["joint"], rates["plain"], strict=True)]
    click.echo(f"plain {statistics.median(rates['plain']):.0f}, joint {statistics.median(rates['joint']):.0f} tokens/s")
    settings = {"rank": rank, "rounds": rounds, "steps": steps, "batch_tokens": batch_tokens}
    speeds = {name: common.spread(values) for name, values in rates.items()}
    run.finish({**settings, "limit": round(limit), "tokens_per_s": speeds, "ratio": common.spread(ratios)}, save)


if __name__ == "__main__":
    main()
