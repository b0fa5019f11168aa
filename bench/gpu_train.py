"""On a GPU: does `specserve train` come from rows to an adapter with its report, in which time and memory?

The command itself, in a process of its own: LoRA and head, the head's fit to what the LoRA says, and the evaluation
with and without drafts, which starts an engine beside what training left. Of --max-steps steps; rates are those of the
second half of them. The device's memory is looked at meanwhile, from outside. `bench.train_speed --device cuda`
compares a step with plain peft.

    python -m bench.gpu_train [--task control2json] [--max-steps 60] [--batch-tokens 8192] [--device cuda]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import torch

from specserve.training.metrics_file import METRICS_FILE

from . import common, options
from .tasks import DEMO_TASKS, EXAMPLES, demo_rows

LOOK_S = 0.1


class MemoryWatch:
    """The most bytes of `device` that were in use by anybody, above those at the start."""

    def __init__(self, device: torch.device):
        self._device, self._is_over = device, threading.Event()
        self._before = self._used()
        self.most = 0
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._is_over.set()
        self._thread.join()
        return self.most

    def _look(self) -> None:
        while not self._is_over.wait(LOOK_S):
            self.most = max(self.most, self._used() - self._before)

    def _used(self) -> int:
        if self._device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free


@click.command(help=__doc__.partition("\n")[0])
@options.model
@click.option("--task", type=click.Choice(DEMO_TASKS), default="control2json", show_default=True, help="Whose rows.")
@options.at_least(2, "--max-steps", 60)
@options.at_least(64, "--batch-tokens", 8192)
@options.at_least(1, "--rows", 40, "Of distillation and of the evaluation.")
@options.at_least(1, "--max-tokens", 200, "Of an answer there.")
@click.option("--device", default="cuda", show_default=True, help="That the command takes, for what is said of it.")
@options.save("gpu_train", default=False)
def main(
    model: str, task: str, max_steps: int, batch_tokens: int, rows: int, max_tokens: int, device: str, save: bool
) -> None:  # fmt: skip
    run = common.start("gpu_train", "torch", "transformers", "peft", device=device)
    click.echo("limit: of a step, that of bench.train_speed")
    watch = MemoryWatch(torch.device(device))
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "adapter"
        command = [sys.executable, "-m", "specserve.cli", "train", "--output", str(output), "--model", model]
        command += ["--data", str(EXAMPLES / "data" / f"{task}.train.jsonl"), "--eval-data", str(demo_rows(task))]
        settings = {
            "optimizer.batch_tokens": batch_tokens, "optimizer.epochs": 1000, "distill.rows": rows,
            "distill.epochs": 2, "distill.max_tokens": max_tokens, "eval.rows": rows, "eval.max_tokens": max_tokens,
            "lora.r": 8,
        }  # fmt: skip
        for name, value in settings.items():
            command += ["--set", f"{name}={value}"]
        start = time.perf_counter()
        done = subprocess.run([*command, "--max-steps", str(max_steps)], capture_output=True, text=True, check=False)
        seconds, most = time.perf_counter() - start, watch.stop()
        click.echo(done.stdout[-2000:] + done.stderr[-2000:])
        if done.returncode:
            raise click.ClickException(f"specserve train ended with {done.returncode}")
        figures = figures_of(output)
    figures |= {"seconds": round(seconds, 1), "most_gib": round(most / 2**30, 2)}
    click.echo(json.dumps(figures))
    run.finish({"task": task, "max_steps": max_steps, "batch_tokens": batch_tokens, "figures": figures}, save)


def figures_of(adapter: Path) -> dict[str, Any]:
    """What the run says of itself."""
    lines = (adapter / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    report = json.loads((adapter / "report.json").read_text(encoding="utf-8"))
    return {
        "steps": len(steps),
        "tokens_per_s": common.spread([step["tokens_per_s"] for step in steps[len(steps) // 2 :]]),
        "loss": [round(statistics.mean(step["loss"] for step in part), 3) for part in (steps[:5], steps[-5:])],
        "task_score": report["task"]["main"],
        "equal_with_and_without_drafts": report["answers_equal_with_and_without_drafts"],
        "speed": report["speed"],
    }


if __name__ == "__main__":
    main()
