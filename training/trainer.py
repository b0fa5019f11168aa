"""The loop of every run, whatever it minimises (objective.py): steps, optimizer, progress, checkpoints, interruption.

Owns the optimizer and when a checkpoint is due; health.py judges the losses. A step is a function of the weights, the
optimizer's state, the objective's state and the step's number, so that a resumed run goes on as if it had never
stopped. A checkpoint is only made of weights whose own loss was seen and is good: it is written in the step after,
between the loss and the update.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from .checkpoint import CHECKPOINT_FILE, read_checkpoint, write_checkpoint
from .health import Health, RunCollapsed
from .metrics_file import MetricsFile
from .objective import Group, Objective, StepLoss
from .processes import Processes
from .run_config import RunConfig
from .run_identity import check_same_run
from .signals import Interrupted, stop_on_signal


class Trainer:
    """Runs the steps of `plan`, each a list of the objective's rows; `identity` goes into the checkpoints."""

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        plan: Sequence[Sequence[int]],
        directory: Path,
        identity: Mapping[str, Any],
    ):
        self.config, self.objective, self.plan = config, objective, plan
        self.directory, self.identity = directory, identity
        self.step = 0
        self.saved_step: int | None = None  # of the checkpoint in the directory
        self._health = Health()
        self._checkpoint_due = False
        self._groups = objective.groups()
        self._optimizer = torch.optim.AdamW(
            [{"params": g.parameters, "lr": g.lr, "weight_decay": g.weight_decay} for g in self._groups],
            betas=(0.9, 0.98),
        )
        self._trained = [parameter for group in self._groups for parameter in group.parameters]
        self.processes = Processes()
        self.processes.share_weights(self._trained)

    # -- the loop

    def train(self, until: int | None = None) -> None:
        """Train to the end of the plan, or to step `until`. Raises `RunCollapsed` for a run that went wrong.

        On the way a batch may be hard: where its loss is too high for a checkpoint, the last one stays.
        """
        end = len(self.plan) if until is None else min(until, len(self.plan))
        progress = tqdm(
            total=len(self.plan),
            initial=self.step,
            unit="step",
            desc="training",
            disable=not self.processes.is_first,
            dynamic_ncols=True,
        )
        metrics = MetricsFile(self.directory, self.step) if self.processes.is_first else None
        with stop_on_signal() as stopped, closing(metrics) if metrics is not None else nullcontext():
            while self.step < end:
                start = time.perf_counter()
                values = self.train_step()
                values["tokens_per_s"] = round(values["tokens"] / (time.perf_counter() - start), 1)
                if metrics is not None:
                    metrics.write(values)
                    progress.update()
                    shown = {"loss": f"{values['loss']:.3f}", "tok/s": values["tokens_per_s"]}
                    if "head_loss" in values:
                        shown["head"] = f"{values['head_loss']:.3f}"
                    progress.set_postfix(shown)
                self._checkpoint_due |= self.step % self.config.checkpoint.every_steps == 0
                if self.processes.sum(float(stopped())):  # a signal may reach one process a step before the others
                    progress.close()
                    self._stop()
        progress.close()
        loss = self._loss_now()
        if self._is_good_now(loss):
            self.save_checkpoint()
        elif end == len(self.plan):
            raise self._gone_wrong(
                f"the loss of the first step's rows was {self._health.first} and is {loss} at the end"
            )
        elif not math.isfinite(loss):
            raise self._gone_wrong(f"the loss is {loss}")

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns what metrics.jsonl gets."""
        config, step, objective = self.config, self.step, self.objective
        objective.begin(step)
        rng = self._seed(step)
        batch = self.processes.part_of(self.plan[step])
        rates = objective.rates(step)
        for group, optimized, rate in zip(self._groups, self._optimizer.param_groups, rates, strict=True):
            optimized["lr"] = group.lr * rate
        num_targets = self.processes.sum(objective.num_targets(batch))
        self._optimizer.zero_grad(set_to_none=True)  # also where a small batch left this process without a row
        found = StepLoss(torch.zeros(()), torch.zeros(()))
        if batch:
            found = objective.step_loss(batch, step, num_targets, self.processes.num, rng)
            found.total.backward()
        self.processes.sum_gradients(self._trained)
        norms = [
            float(torch.nn.utils.clip_grad_norm_(group.parameters, config.optimizer.grad_clip))
            for group in self._groups
        ]
        # sync: the run must stop on NaN before it steps
        loss = self.processes.sum(found.loss_sum.item()) / num_targets
        self._check(loss, norms)
        if self._checkpoint_due and self._health.is_good(loss):
            self.save_checkpoint()
        self._health.see(loss)
        self._optimizer.step()
        self.step += 1
        values = {"step": step + 1, "lr": round(self._groups[0].lr * rates[0], 8), **found.values}
        tokens = int(self.processes.sum(objective.num_tokens(batch)))
        return {**values, "loss": loss, "grad_norm": norms[0], "tokens": tokens}

    def _seed(self, step: int) -> random.Random:
        """Dropout and what else is drawn in a step is a function of the step."""
        torch.manual_seed(self.config.seed * 1_000_003 + step)
        return random.Random(self.config.seed * 1_000_003 + step)

    # -- health

    def _check(self, loss: float, norms: Sequence[float]) -> None:
        problem = self._health.problem(self.step, loss, norms[0])
        if problem is not None:
            raise self._gone_wrong(problem)
        for group, norm in zip(self._groups, norms, strict=True):
            if not math.isfinite(norm):
                raise self._gone_wrong(f"the gradient that {group.setting} scales has norm {norm}", group)

    @torch.no_grad()
    def _loss_now(self) -> float:
        """The loss of the weights as they are: over the next step's rows, or the first step's when all are done."""
        step = self.step if self.step < len(self.plan) else 0
        self._seed(step)
        batch = self.processes.part_of(self.plan[step])
        num_targets = self.processes.sum(self.objective.num_targets(batch))
        loss = self.objective.loss_sum(batch).item() if batch else 0.0
        return self.processes.sum(loss) / num_targets

    def _is_good_now(self, loss: float) -> bool:
        at_end = self.step == len(self.plan)
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in self._groups[0].parameters)
        return finite and (self._health.is_good_end(loss) if at_end else self._health.is_good(loss))

    def _gone_wrong(self, problem: str, group: Group | None = None) -> RunCollapsed:
        group = group or self._groups[0]
        step = min(self.step + 1, len(self.plan))
        return RunCollapsed(
            f"step {step}: {problem}; lower {group.setting} ({group.lr}) and start again in another --output; "
            f"{self._kept()}",
            param=group.setting,
        )

    def _kept(self) -> str:
        if self.saved_step is None:
            return "no checkpoint has been written"
        return f"{self.directory / CHECKPOINT_FILE} holds the last good weights, those of step {self.saved_step}"

    def _stop(self) -> NoReturn:
        if self._is_good_now(self._loss_now()):
            self.save_checkpoint()
        if self.saved_step is None:
            raise Interrupted(f"stopped at step {self.step} of {len(self.plan)}; no checkpoint has been written")
        raise Interrupted(
            f"stopped at step {self.step} of {len(self.plan)}; go on from step {self.saved_step} with --resume"
        )

    # -- checkpoints

    def save_checkpoint(self) -> None:
        """Write weights, optimizer and step; a disk that takes no more costs the checkpoint and not the run."""
        self._checkpoint_due = False
        if not self.processes.is_first:
            self.saved_step = self.step
            return
        state = {
            "step": self.step,
            "identity": dict(self.identity),
            "health": asdict(self._health),
            "lora": [parameter.detach() for parameter in self._groups[0].parameters],
            "objective": self.objective.state(),
            "optimizer": self._optimizer.state_dict(),
        }
        try:
            write_checkpoint(self.directory / CHECKPOINT_FILE, state)
            self.saved_step = self.step
        except OSError as error:
            tqdm.write(f"warning: no checkpoint at step {self.step}: {error}; training goes on, the old one stays")

    def resume(self) -> None:
        """Go on from the checkpoint in the directory. Raises `UserError` if there is none or it is of another run."""
        path = self.directory / CHECKPOINT_FILE
        state = read_checkpoint(path)
        check_same_run(state["identity"], self.identity, str(path))
        with torch.no_grad():
            for parameter, saved in zip(self._groups[0].parameters, state["lora"], strict=True):
                parameter.copy_(saved)
        self.objective.load_state(state["objective"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._health = Health(**state["health"])
        self.step = self.saved_step = state["step"]
