"""One training run from configuration to finished directory, whatever its task (task_run.py).

Phases: the checks, the steps (trainer.py), then what makes a servable adapter of the result. Nothing is written before
everything is checked and the directory is held (run_directory.py).
"""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from tqdm import tqdm

from .checkpoint import CHECKPOINT_FILE, read_checkpoint
from .evaluation.verdict import steps_warning
from .lora_model import arithmetic
from .objective import Objective
from .processes import first_process, process_group
from .run_config import RunConfig
from .run_directory import RunDirectory, disk_errors, held_directory, started_as, state_of
from .run_identity import check_same_run, check_same_settings, run_identity
from .task_run import TaskRun, checked_run
from .trainer import Trainer


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What became of a run."""

    output: Path
    was_finished: bool = False  # before; nothing was done
    is_part: bool = False  # it stopped where it was told to, and can go on
    report: dict[str, Any] | None = None  # None without held-out rows
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stop:
    """Where a run ends or pauses: behind this share of its steps, where `look` sees it before its model goes."""

    share: float
    look: Callable[[TaskRun, Objective | None, int], None]  # gets the steps that were taken, too

    def step_of(self, num_steps: int) -> int:
        return math.ceil(self.share * num_steps)


def train_run(config: RunConfig, *, resume: bool = False, stop: Stop | None = None) -> TrainResult | None:
    """Run all phases, or none if a resumed run is finished already. The first process returns what became of it.

    With `stop` at less than all steps nothing follows them: the run is left with its checkpoint, to be resumed.
    Raises `UserError` for what the user can fix, before anything is written where it can be known before.
    """
    with process_group():
        return _run(config, resume, stop)


def _run(config: RunConfig, resume: bool, stop: Stop | None) -> TrainResult | None:
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    output = Path(config.output)
    directory: RunDirectory | None = None
    config = _dated(config, output, resume)
    with ExitStack() as stack:

        def open_output() -> bool:
            nonlocal directory
            if resume and state_of(output) == "finished":
                check_same_settings(started_as(output), config, f"the finished run in {output}")
                return True
            directory = stack.enter_context(held_directory(output, resume))
            return False

        if first_process(open_output):
            result = TrainResult(output, was_finished=True)
        else:
            stack.enter_context(disk_errors(output))
            result = _train_and_finish(config, directory, resume, is_first, stop)
    return result if is_first else None


def _dated(config: RunConfig, output: Path, resume: bool) -> RunConfig:
    """`config` with the day on which the run began: a resumed one has the same rows, whatever day it is."""
    if config.data.date is not None:
        return config
    is_resumed = resume and output.is_dir() and state_of(output) != "empty"
    date = started_as(output).data.date if is_resumed else datetime.date.today()
    return msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, date=date))


def _train_and_finish(
    config: RunConfig, directory: RunDirectory | None, resume: bool, is_first: bool, stop: Stop | None
) -> TrainResult:
    """`directory` is the first process's; the others only train."""
    output = Path(config.output)
    run = checked_run(config)
    given, config = config, run.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and dist.is_initialized():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    dtype = arithmetic(config.dtype, device)
    identity = run_identity(
        config,
        run.model_dir,
        run.rows,
        run.plan,
        uses_bf16=dtype == torch.bfloat16,
        num_processes=dist.get_world_size() if dist.is_initialized() else 1,
    )
    checkpoint = output / CHECKPOINT_FILE
    if resume and checkpoint.is_file():
        check_same_run(read_checkpoint(checkpoint)["identity"], identity, str(checkpoint))
    elif resume and directory is not None:
        check_same_settings(started_as(output), given, f"the run in {output}, which has no checkpoint yet,")
    if dist.is_initialized():
        dist.barrier()  # the others are as content before anything is written
    if directory is not None:
        directory.begin(given)
        for warning in run.warnings:
            tqdm.write(f"warning: {warning}")
    torch.manual_seed(config.seed)  # before the LoRA's random half is drawn
    objective = run.objective(dtype, device)
    if objective is not None:
        trainer = Trainer(config, objective, run.plan, output, identity)
        if resume and checkpoint.is_file():
            trainer.resume()
        trainer.train(until=None if stop is None else stop.step_of(len(run.plan)))
        del trainer
    num_steps = None if objective is None else len(run.plan)
    if stop is not None:
        num_taken = num_steps and stop.step_of(num_steps)
        stop.look(run, objective, num_taken or 0)
        if num_taken != num_steps:
            return TrainResult(output, is_part=True)
    del objective
    if dist.is_initialized():
        # Together: a process that leaves while another still talks to it can bring that one down.
        dist.barrier()
    report = run.finish() if is_first else None
    if report is not None:
        return TrainResult(output, report=report, warnings=tuple(report["warnings"]))
    return TrainResult(output, warnings=tuple(steps_warning(num_steps, config.optimizer.min_steps)))
