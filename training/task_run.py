"""What a task makes of a run, as run.py sees it, and which task a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from .objective import Objective
from .run_config import RunConfig
from .run_identity import TrainedRow


class TaskRun(Protocol):
    """A run that is checked. Nothing is loaded before `objective`, and nothing written before `finish`."""

    @property
    def config(self) -> RunConfig:
        """Without open defaults: what follows from model or rows is filled in."""
        ...

    @property
    def model_dir(self) -> Path: ...

    @property
    def rows(self) -> Sequence[TrainedRow]: ...

    @property
    def plan(self) -> list[list[int]]:
        """Indices into `rows`, step by step."""
        ...

    @property
    def warnings(self) -> list[str]: ...

    def objective(self, dtype: torch.dtype, device: torch.device) -> Objective | None:
        """The model with what is trained of it; None: no steps are needed."""
        ...

    def held_out_loss(self) -> float | None:
        """The objective's loss over held-out rows, of the weights as they are; None without such rows."""
        ...

    def finish(self) -> dict[str, Any] | None:
        """All that follows the steps: the adapter's files, and the report if there are held-out rows."""
        ...


class Checked(Protocol):
    """What checking a run has found of it, as `TaskRun` has it; `examples` are its rows."""

    @property
    def config(self) -> RunConfig: ...
    @property
    def model_dir(self) -> Path: ...
    @property
    def examples(self) -> Sequence[TrainedRow]: ...
    @property
    def plan(self) -> list[list[int]]: ...
    @property
    def warnings(self) -> list[str]: ...


P = TypeVar("P", bound=Checked)


class PreparedRun(Generic[P]):
    """What a `TaskRun` says of itself, from what was prepared for it."""

    def __init__(self, prepared: P):
        self._prepared = prepared

    @property
    def config(self) -> RunConfig:
        return self._prepared.config

    @property
    def model_dir(self) -> Path:
        return self._prepared.model_dir

    @property
    def rows(self) -> Sequence[TrainedRow]:
        return self._prepared.examples

    @property
    def plan(self) -> list[list[int]]:
        return self._prepared.plan

    @property
    def warnings(self) -> list[str]:
        return self._prepared.warnings


def checked_run(config: RunConfig) -> TaskRun:
    """The run of the task that `config` names. Raises `UserError` for all that can be known before."""
    if config.task != "generate":
        from .pooling.run import PoolingRun

        return PoolingRun.of(config)
    from .generation_run import GenerationRun

    return GenerationRun.of(config)
