"""One run of a sweep to the end of one rung, in a process of its own: `python -m specserve.training.sweep.rung`.

The trainer's own code does all of it; here the weights are looked at, before and after they are finished, and judged.
What went wrong in the training is a result like others. Exit codes: 0 there is a result, 2 the user can fix it, 130
interrupted.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from ...adapter_files import CONFIG_FILE, LOOKAHEAD_FILES, POOLING_FILE, WEIGHTS_FILE
from ...errors import UserError
from ..data.rows import read_rows
from ..generation_run import GenerationRun
from ..health import RunCollapsed
from ..metrics_file import METRICS_FILE, read_metrics
from ..objective import Objective
from ..run import Stop, train_run
from ..run_directory import state_of
from ..signals import Interrupted
from ..task_run import TaskRun
from .grid import config_of
from .halving import share_of
from .leash import end_with_parent
from .results import FORGETS, RungResult, SweepDirectory, SweepPlan, write_result

_MOST_ENDLESS = 0.2  # of a finished adapter's answers
_MOST_RATIO = 1e6  # of perplexities; more is no more than that
_SERVED_FILES = (CONFIG_FILE, WEIGHTS_FILE, POOLING_FILE, *LOOKAHEAD_FILES)


def run_rung(directory: SweepDirectory, name: str, rung: int) -> None:
    """Train the run of `name` to the end of `rung`, from its last checkpoint if there is one, and write the result.

    Raises `UserError` for what kept it from beginning, and `Interrupted`.
    """
    plan, start = directory.plan(), time.monotonic()
    output = directory.adapter(name)
    config = msgspec.structs.replace(config_of(plan.base, plan.points[name]), output=str(output))

    def look(run: TaskRun, objective: Objective | None, step: int) -> None:
        seen = _seen(run, objective, plan, step)
        write_result(directory.look_file(name, rung), seen)

    stop = Stop(share_of(rung, plan.num_rungs, plan.factor), look)
    try:
        done = train_run(config, resume=state_of(output) != "empty", stop=stop)
    except RunCollapsed as error:
        steps = [values["step"] for values in read_metrics(output / METRICS_FILE)]
        seen = RungResult(step=max(steps, default=0), num_steps=0, seconds=0.0, marks=("diverged",), problem=str(error))
        done = None
    else:
        found = directory.look(name, rung)
        assert found is not None
        seen = found
    if done is not None and not done.is_part:
        report = done.report or msgspec.json.decode((output / "report.json").read_bytes())
        is_head_alone = config.task == "generate" and not config.lora.is_trained
        seen = _with_report(seen, report, output, is_head_alone)
    result = msgspec.structs.replace(seen, seconds=round(time.monotonic() - start, 1))
    write_result(directory.result_file(name, rung), result)


def _seen(run: TaskRun, objective: Objective | None, plan: SweepPlan, step: int) -> RungResult:
    marks = []
    loss = run.held_out_loss()
    if loss is not None and not math.isfinite(loss):
        loss, marks = None, ["diverged"]
    if objective is not None and _is_zero(objective):
        marks.append("zeros")
    ratio = None
    trains_lora = objective is not None  # a head alone forgets nothing
    if plan.forgetting_limit and trains_lora and isinstance(run, GenerationRun) and not marks:
        with_lora, without = run.losses_on(read_rows(plan.general))
        ratio = round(min(_MOST_RATIO, math.exp(min(with_lora - without, 700.0))), 4)
        if not ratio <= plan.forgetting_limit:
            marks.append(FORGETS)
    return RungResult(
        step=step, num_steps=len(run.plan), seconds=0.0, loss=loss, general_ratio=ratio, marks=tuple(marks)
    )


def _is_zero(objective: Objective) -> bool:
    """Whether the LoRA does nothing: one of the two factors of each of its pairs is zero."""
    trained = objective.groups()[0].parameters
    return 2 * sum(not bool(torch.any(parameter != 0)) for parameter in trained) >= len(trained)


def _with_report(seen: RungResult, report: Mapping[str, Any], output: Path, is_head_alone: bool) -> RungResult:
    marks = list(seen.marks)
    if not is_head_alone and report.get("answers_without_end", 0.0) > _MOST_ENDLESS:
        marks.append("repeats")
    speed = report.get("speed", {}).get("batch 1", {})
    return msgspec.structs.replace(
        seen,
        marks=tuple(marks),
        score=report["mean_accepted_length_batch_1"] if is_head_alone else report["task"]["main"],
        task={key: value for key, value in report["task"].items() if key != "main"},
        tokens_per_s=speed.get("tokens_per_s"),
        tokens_per_verification=report.get("mean_accepted_length_batch_1"),
        num_bytes=sum((output / file).stat().st_size for file in _SERVED_FILES if (output / file).is_file()),
    )


def main() -> int:
    """DIRECTORY NAME RUNG."""
    end_with_parent()
    directory, name, rung = SweepDirectory(Path(sys.argv[1])), sys.argv[2], int(sys.argv[3])
    try:
        run_rung(directory, name, rung)
    except Interrupted as error:
        print(error, file=sys.stderr)
        return 130
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
