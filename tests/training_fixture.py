"""A tiny task and a trainer of a tiny model on it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch

from specserve.special_tokens import eos_token_ids
from specserve.tokenizer import TextTokenizer
from specserve.training.batching import plan_run
from specserve.training.dataset import read_rows, tokenize
from specserve.training.head_module import LookaheadHead, common_prefix_len, task_vocab
from specserve.training.lora_model import LoraModel
from specserve.training.run_config import HeadConfig, JointConfig, LoraConfig, OptimizerConfig, RunConfig
from specserve.training.run_identity import run_identity
from specserve.training.trainer import Trainer


def write_rows(path: Path, num_rows: int, seed: int = 0) -> Path:
    """Rows whose completion is JSON that copies a word and a number of the prompt."""
    rng = random.Random(seed)
    words = ["fox", "dog", "box", "jug", "server", "adapter", "token", "stream"]
    with open(path, "w") as file:
        for _ in range(num_rows):
            word, number = rng.choice(words), rng.randrange(1000)
            row = {"prompt": f"name: {word}\nnumber: {number}", "completion": json.dumps({"name": word, "n": number})}
            file.write(json.dumps(row) + "\n")
    return path


def run_config(**optimizer) -> RunConfig:
    return RunConfig(
        lora=LoraConfig(r=4, alpha=8, dropout=0.1),
        head=HeadConfig(hidden_size=16, vocab_size=64, draft_len=6, train_steps_ahead=4, copy_window=4),
        joint=JointConfig(start=0.3, warmup=0.2),
        optimizer=OptimizerConfig(**{"lr": 5e-3, "batch_tokens": 400, "epochs": 2, **optimizer}),
    )


def make_trainer(model_dir: Path, rows: Path, directory: Path, config: RunConfig | None = None) -> Trainer:
    config = config or run_config()
    tokenizer = TextTokenizer(model_dir)
    examples = tokenize(read_rows(rows), tokenizer, eos_token_ids(model_dir))
    torch.manual_seed(0)
    model = LoraModel(model_dir, config.lora, torch.float32, torch.device("cpu"), None)
    head = LookaheadHead(model.hidden_size, config.head.hidden_size, task_vocab(examples, 64), config.head.copy_window)
    opt = config.optimizer
    plan = plan_run([len(e.tokens) for e in examples], opt.batch_tokens, config.seed, opt.epochs, opt.max_steps)
    directory.mkdir(exist_ok=True)
    identity = run_identity(config, model_dir, examples, plan)
    return Trainer(config, model, head, examples, plan, common_prefix_len(examples), directory, identity)


def few_steps(plan: list[list[int]]) -> list[list[int]]:
    """Four, one of them of a single row: one of two processes gets none."""
    return [plan[0], plan[1][:1], *plan[2:4]]


def torchrun(num_processes: int, *command: str, timeout_s: float = 240) -> str:
    """Run `command` (a script, or -m and a module) in so many processes of one group; returns what they print.

    The rendezvous takes a free port, so that runs beside each other do not meet.
    """
    tests = Path(__file__).parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent), "PYTHONFAULTHANDLER": "1"}
    done = subprocess.run(
        [*launcher, "--nproc-per-node", str(num_processes), *command],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=env,
    )
    # All of it: what the worker said stands far above torchrun's own traceback.
    assert done.returncode == 0, done.stderr
    return done.stdout
