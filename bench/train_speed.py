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

from specserve.model.store import resolve_model
from specserve.text.special_tokens import eos_token_ids
from specserve.text.tokenizer import TextTokenizer
from specserve.training.batching import plan_run
from specserve.training.dataset import Example, read_rows, tokenize
from specserve.training.head_module import LookaheadHead, common_prefix_len, task_vocab
from specserve.training.lora_model import LINEARS, LoraModel
from specserve.training.run_config import JointConfig, LoraConfig, OptimizerConfig, RunConfig
from specserve.training.trainer import Trainer

from . import common


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


@click.command(help=__doc__.partition("\n")[0])
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--model", default="", help="Base model; default: specserve's default model.")
@click.option("--rank", type=click.IntRange(1), default=16, show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Steps of each in a round.")
@click.option("--batch-tokens", type=click.IntRange(64), default=1024, show_default=True)
@click.option("--save/--no-save", default=True, help="Append the result to bench/results/train_speed.jsonl.")
def main(data: Path, model: str, rank: int, rounds: int, steps: int, batch_tokens: int, save: bool) -> None:
    machine = common.hardware()
    click.echo(common.hardware_line(machine))
    model_dir = resolve_model(model)
    examples = tokenize(read_rows(data), TextTokenizer(model_dir), eos_token_ids(model_dir))
    random.Random(0).shuffle(examples)
    config = RunConfig(
        lora=LoraConfig(r=rank, alpha=2 * rank),
        joint=JointConfig(start=0.0),
        optimizer=OptimizerConfig(batch_tokens=batch_tokens, lr=1e-4),
    )
    config = msgspec.structs.replace(config, output="bench")
    lora = LoraModel(model_dir, config.lora, torch.float32, torch.device("cpu"), None)
    vocab = task_vocab(examples, config.head.vocab_size)
    head = LookaheadHead(lora.hidden_size, config.head.hidden_size, vocab, config.head.copy_window)
    plan = plan_run([len(e.tokens) for e in examples], batch_tokens, 0, 1, None)
    plain = PlainLoop(model_dir, rank, examples, batch_tokens)
    rates: dict[str, list[float]] = {"plain": [], "joint": []}
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(config, lora, head, examples, plan, common_prefix_len(examples), Path(directory), {})
        plain.step()
        trainer.train_step()
        for _ in range(rounds):
            for name in ("plain", "joint"):
                start, tokens = time.perf_counter(), 0
                for _ in range(steps):
                    tokens += plain.step() if name == "plain" else trainer.train_step()["tokens"]
                rates[name].append(tokens / (time.perf_counter() - start))
    ratios = [joint / other for joint, other in zip(rates["joint"], rates["plain"], strict=True)]
    record = {
        "commit": common.commit(),
        "versions": common.versions("torch", "transformers", "peft"),
        "hardware": machine,
        "rank": rank,
        "rounds": rounds,
        "steps": steps,
        "batch_tokens": batch_tokens,
        "tokens_per_s": {name: common.spread(values) for name, values in rates.items()},
        "ratio": common.spread(ratios),
    }
    click.echo(f"plain {statistics.median(rates['plain']):.0f}, joint {statistics.median(rates['joint']):.0f} tokens/s")
    if save:
        common.append_result("train_speed", record)


if __name__ == "__main__":
    main()
