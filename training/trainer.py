"""The joint fine-tune: the LoRA's cross-entropy and the head's loss (joint_loss.py) in one backward pass.

Owns the optimizer and when a checkpoint is due; health.py judges the losses. A step is a function of the
weights, the optimizer's state and the step's number, so that a resumed run goes on as if it had never stopped. A
checkpoint is only made of weights whose own loss was seen and is good: it is written in the step after, between the
loss and the update.
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

from ..errors import UserError
from .checkpoint import CHECKPOINT_FILE, read_checkpoint, write_checkpoint
from .data.dataset import Example
from .head_module import LookaheadHead
from .health import Health
from .joint_loss import Forward
from .lora_model import LoraModel
from .metrics_file import MetricsFile
from .processes import Processes
from .run_config import RunConfig
from .run_identity import check_same_run
from .schedule import Schedule
from .signals import Interrupted, stop_on_signal


class Trainer:
    """Runs the steps of `plan`, each a list of indices into `examples`; `identity` goes into the checkpoints."""

    def __init__(
        self,
        config: RunConfig,
        model: LoraModel,
        head: LookaheadHead | None,
        examples: Sequence[Example],
        plan: Sequence[Sequence[int]],
        copy_start: int,
        directory: Path,
        identity: Mapping[str, Any],
    ):
        self.config, self.model, self.head = config, model, head
        self.examples, self.plan, self.copy_start = examples, plan, copy_start
        self.directory, self.identity = directory, identity
        self.step = 0
        self.saved_step: int | None = None  # of the checkpoint in the directory
        self._health = Health()
        self.schedule = Schedule(len(plan), config.optimizer, config.joint)
        self._checkpoint_due = False
        groups: list[dict[str, Any]] = [{"params": model.parameters, "lr": config.optimizer.lr}]
        if head is not None:
            groups.append({"params": list(head.parameters()), "lr": config.head.lr, "weight_decay": 0.0})
        self._optimizer = torch.optim.AdamW(groups, weight_decay=config.optimizer.weight_decay, betas=(0.9, 0.98))
        self._peak = [group["lr"] for group in groups]
        self._trained = [parameter for group in groups for parameter in group["params"]]
        self.processes = Processes()
        self.processes.share_weights(self._trained)

    # -- the loop

    def train(self, until: int | None = None) -> None:
        """Train to the end of the plan (or to step `until`). Raises `UserError` for a run that went wrong."""
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
        if not self._is_good_now(loss):
            raise self._gone_wrong(
                f"the loss of the first step's rows was {self._health.first} and is {loss} at the end"
            )
        self.save_checkpoint()

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns what metrics.jsonl gets."""
        config, step = self.config, self.step
        torch.manual_seed(config.seed * 1_000_003 + step)  # dropout: a function of the step
        rng = random.Random(config.seed * 1_000_003 + step)
        batch = [self.examples[idx] for idx in self.processes.part_of(self.plan[step])]
        scale = self.schedule.rate(step)
        for group, peak in zip(self._optimizer.param_groups, self._peak, strict=True):
            group["lr"] = peak * scale
        if len(self._optimizer.param_groups) > 1:
            self._optimizer.param_groups[1]["lr"] = self._peak[1] * self.schedule.head_rate(step)
        weight = self.schedule.head_weight(step)
        num_targets = self.processes.sum(sum(sum(example.loss_mask[1:]) for example in batch))
        values: dict[str, Any] = {"step": step + 1, "lr": round(config.optimizer.lr * scale, 8)}
        loss_sum = torch.zeros(())
        self._optimizer.zero_grad(set_to_none=True)  # also where a small batch left this process without a row
        if batch:
            forward = Forward.of(self.model, batch)
            loss_sum = forward.lora_loss_sum()
            total = loss_sum / num_targets
            if self.head is not None and weight > 0:
                reach = 0.0 if rng.random() < config.joint.detach_prob else weight
                extra, rate = forward.head_loss(self.head, config.head, self.copy_start, reach, rng)
                total = total + extra / self.processes.num
                values["head_loss"] = extra.item()  # sync: one number a step, for the log
                values["head_hit_rate"] = [round(value, 4) for value in rate.tolist()]
            total.backward()
        self.processes.sum_gradients(self._trained)
        norms = [
            float(torch.nn.utils.clip_grad_norm_(group["params"], config.optimizer.grad_clip))
            for group in self._optimizer.param_groups
        ]
        loss = self.processes.sum(loss_sum.item()) / num_targets  # sync: the run must stop on NaN before it steps
        self._check(loss, norms)
        if self._checkpoint_due and self._health.is_good(loss):
            self.save_checkpoint()
        self._health.see(loss)
        self._optimizer.step()
        self.step += 1
        tokens = self.processes.sum(sum(len(example.tokens) for example in batch))
        return {**values, "loss": loss, "grad_norm": norms[0], "tokens": int(tokens)}

    # -- health

    def _check(self, loss: float, norms: Sequence[float]) -> None:
        problem = self._health.problem(self.step, loss, norms[0])
        if problem is not None:
            raise self._gone_wrong(problem)
        if not all(math.isfinite(norm) for norm in norms):
            raise self._gone_wrong(f"the gradient of the head has norm {norms[1]}", "head.lr")

    @torch.no_grad()
    def _loss_now(self) -> float:
        """The loss of the weights as they are: over the next step's rows, or the first step's when all are done."""
        step = self.step if self.step < len(self.plan) else 0
        torch.manual_seed(self.config.seed * 1_000_003 + step)
        batch = [self.examples[idx] for idx in self.processes.part_of(self.plan[step])]
        loss, num_targets = 0.0, self.processes.sum(sum(sum(example.loss_mask[1:]) for example in batch))
        if batch:
            loss = Forward.of(self.model, batch).lora_loss_sum().item()
        return self.processes.sum(loss) / num_targets

    def _is_good_now(self, loss: float) -> bool:
        at_end = self.step == len(self.plan)
        finite = all(bool(torch.isfinite(parameter).all()) for parameter in self.model.parameters)
        return finite and (self._health.is_good_end(loss) if at_end else self._health.is_good(loss))

    def _gone_wrong(self, problem: str, setting: str = "optimizer.lr") -> UserError:
        rate = self.config.head.lr if setting == "head.lr" else self.config.optimizer.lr
        step = min(self.step + 1, len(self.plan))
        return UserError(
            f"step {step}: {problem}; lower {setting} ({rate}) and start again in another --output; {self._kept()}",
            param=setting,
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
            "lora": [parameter.detach() for parameter in self.model.parameters],
            "head": None if self.head is None else self.head.state_dict(),
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
            for parameter, saved in zip(self.model.parameters, state["lora"], strict=True):
                parameter.copy_(saved)
        if self.head is not None:
            self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._health = Health(**state["health"])
        self.step = self.saved_step = state["step"]
