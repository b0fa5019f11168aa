"""What a server and a program's `LLM` both begin with: the engine of their settings, and the name of its model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..config import ServeConfig, engine_part
from ..model.store import DEFAULT_MODEL
from .engine_client.client import EngineClient, engine_command


def engine_of(
    config: ServeConfig, model_dir: Path, roots: Sequence[Path], command: list[str] | None = None
) -> EngineClient:
    """An engine that is not started yet; it reads adapters below `roots`, anywhere where there are none."""
    return EngineClient(
        msgspec.structs.replace(engine_part(config), model=str(model_dir), adapter_roots=tuple(map(str, roots))),
        silence_timeout_s=config.engine_timeout_s,
        step_timeout_s=config.engine_step_timeout_s,
        command=command or engine_command(config.log_level),
    )


def model_name_of(config: ServeConfig, model_dir: Path) -> str:
    """What requests call the base model."""
    return config.served_model_name or (model_dir.name if config.model else DEFAULT_MODEL.name)
