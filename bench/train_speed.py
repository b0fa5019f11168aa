"""Is a joint training step (LoRA and head) faster than a plain peft loop without a head?

Both train the same LoRA on the same rows on this machine, interleaved. The plain loop is what a first script does:
batches in the data's order padded to the longest row, transformers' own loss, so logits for every position. Ours takes
similar lengths together and makes logits only where there is loss; its head learns from the first step. Tokens are real
ones, padding not counted. The limit is what the machine's matrix products reach. On a CPU all of it is fp32, on CUDA
the base model is bf16, and the memory that a step takes beside what lies there before stands in the result.

    python -m bench.train_speed --data FILE [--rounds 3] [--steps 3] [--batch-tokens 1024] [--device cuda]
"""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import torch

from specserve.model.shapes import LINEARS
from specserve.training.data.batching import plan_run
from specserve.training.data.dataset import Example
from specserve.training.head_fit import new_head
from specserve.training.head_module import common_prefix_len, task_vocab
from specserve.training.joint_loss import JointObjective
from specserve.training.lora_model import LoraModel
from specserve.training.run_config import JointConfig, LoraConfig, OptimizerConfig, RunConfig
from specserve.training.trainer import Trainer

from . import common, options
from .tasks import BaseModel


class PlainLoop:
    """transformers + peft as in their examples."""

    def __init__(
        self, model_dir: Path, rank: int, examples: list[Example], batch_tokens: int, dtype: torch.dtype,
        device: torch.device,
    ):  # fmt: skip
        import peft
        from transformers import AutoModelForCausalLM

        base: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).to(device)
        lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(LINEARS), task_type="CAUSAL_LM")
        self.model: Any = peft.get_peft_model(base, lora)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        mean = sum(len(e.tokens) for e in examples) / len(examples)
        self.batch_len = max(1, round(batch_tokens / mean))
        self.examples = examples
        self.position, self.device = 0, device

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
        ids, mask, labels = (tensor.to(self.device) for tensor in (ids, mask, labels))
        self.optimizer.zero_grad()
        self.model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        self.optimizer.step()
        return sum(len(e.tokens) for e in batch)


class StepMemory:
    """The most that any step took beside what lay on the device before it."""

    def __init__(self, device: torch.device):
        self._device, self.most = device, 0

    @contextlib.contextmanager
    def steps(self) -> Iterator[None]:
        """Around steps that are timed: what was queued is done behind."""
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        torch.cuda.synchronize(self._device)
        self.most = max(self.most, torch.cuda.max_memory_allocated(self._device) - before)


def matmul_rate(dtype: torch.dtype, device: torch.device, repeats: int = 7) -> float:
    """Operations a second of a square product; the fastest repeat counts."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


@click.command(help=__doc__.partition("\n")[0])
@options.file("--data")
@options.model
@options.at_least(1, "--rank", 16)
@options.rounds(3)
@options.at_least(1, "--steps", 3, "Steps of each in a round.")
@options.at_least(64, "--batch-tokens", 1024)
@click.option("--device", "on", default="cpu", show_default=True)
@options.save("train_speed")
def main(data: Path, model: str, rank: int, rounds: int, steps: int, batch_tokens: int, on: str, save: bool) -> None:
    run = common.start("train_speed", "torch", "transformers", "peft", device=on)
    device = torch.device(on)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = BaseModel.load(model)
    limit = matmul_rate(dtype, device) / (4 * common.num_parameters(base.path))  # 2 operations a weight forward, 2 back
    click.echo(f"limit: {limit:.0f} tokens/s if matrix products through the frozen weights were all")
    examples = base.examples(data)
    random.Random(0).shuffle(examples)
    config = RunConfig(
        lora=LoraConfig(r=rank, alpha=2 * rank),
        joint=JointConfig(start=0.0),
        optimizer=OptimizerConfig(batch_tokens=batch_tokens, lr=1e-4),
    )
    config = msgspec.structs.replace(config, output="bench")
    lora = LoraModel(base.path, config.lora, dtype, device, None)
    vocab = task_vocab(examples, config.head.vocab_size)
    head = new_head(lora, config.head, vocab)
    lengths = [len(e.tokens) for e in examples]
    plan = plan_run(lengths, batch_tokens, 0, 1, None)
    plan = plan_run(lengths, batch_tokens, 0, math.ceil((1 + rounds * steps) / len(plan)), None)
    objective = JointObjective(config, lora, head, examples, common_prefix_len(examples), len(plan))
    plain = PlainLoop(base.path, rank, examples, batch_tokens, dtype, device)
    rates: dict[str, list[float]] = {"plain": [], "joint": []}
    memory = {name: StepMemory(device) for name in rates}
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(config, objective, plan, Path(directory), {})
        plain.step()
        trainer.train_step()
        for _ in range(rounds):
            for name in ("plain", "joint"):
                start, tokens = time.perf_counter(), 0
                with memory[name].steps():
                    for _ in range(steps):
                        tokens += plain.step() if name == "plain" else trainer.train_step()["tokens"]
                rates[name].append(tokens / (time.perf_counter() - start))
    ratios = [joint / other for joint, other in zip(rates["joint"], rates["plain"], strict=True)]
    click.echo(f"plain {statistics.median(rates['plain']):.0f}, joint {statistics.median(rates['joint']):.0f} tokens/s")
    step_mib = {name: round(used.most / 2**20) for name, used in memory.items()}
    settings = {
        "dtype": str(dtype),
        "step_mib": step_mib,
        "rank": rank,
        "rounds": rounds,
        "steps": steps,
        "batch_tokens": batch_tokens,
    }
    speeds = {name: common.spread(values) for name, values in rates.items()}
    run.finish({**settings, "limit": round(limit), "tokens_per_s": speeds, "ratio": common.spread(ratios)}, save)


if __name__ == "__main__":
    main()
