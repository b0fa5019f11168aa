"""What a server and a program's `LLM` both begin with: the engine of their settings, and the name of its model."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..adapter_files import HEAD_CONFIG_FILE
from ..config import EngineConfig, ServeConfig, engine_part
from ..errors import UserError
from ..model.store import DEFAULT_MODEL
from .engine_client.client import EngineClient, engine_command

logger = logging.getLogger(__name__)


def engine_of(
    config: ServeConfig, model_dir: Path, roots: Sequence[Path], command: list[str] | None = None
) -> EngineClient:
    """An engine that is not started yet. Raises `UserError` for settings of what is not there."""
    return EngineClient(
        process_settings(config, model_dir, roots),
        silence_timeout_s=config.engine_timeout_s,
        step_timeout_s=config.engine_step_timeout_s,
        command=command or engine_command(config.log_level),
    )


def process_settings(config: ServeConfig, model_dir: Path, roots: Sequence[Path]) -> EngineConfig:
    """Of an engine's process, which reads adapters below `roots`, anywhere where there are none.

    Raises `UserError` for settings of what is not there.
    """
    for name in ("history_dir", "serving_log"):
        _check_kept(name, getattr(config, name))
    if config.history_dir is not None and not config.learn_history:
        logger.warning("history_dir is set and learn_history is not: nothing is learned, and nothing kept or read")
    settings = msgspec.structs.replace(engine_part(config), model=str(model_dir), adapter_roots=tuple(map(str, roots)))
    return with_base_head(settings)


def _check_kept(name: str, value: str | None) -> None:
    """What is to be kept in a folder that cannot be had is lost: better said at the start than at the first write."""
    if value is None:
        return
    folder, reason = Path(value).expanduser(), "it is not this user's to write"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return
    except OSError as error:
        reason = error.strerror or str(error)
    raise UserError(f"{name} {value!r} cannot be used: {reason}; name another folder or leave it out", param=name)


def with_base_head(config: EngineConfig) -> EngineConfig:
    """`config` with the absolute path of its base head. Raises `UserError` where there is none in that directory.

    What else may be wrong with it costs the drafts and not the start.
    """
    if config.base_head is None:
        return config
    directory = Path(config.base_head).expanduser().absolute()
    if not (directory / HEAD_CONFIG_FILE).is_file():
        raise UserError(
            f"base_head is {config.base_head}, which has no {HEAD_CONFIG_FILE}; name a directory that `specserve train "
            "--head-only --base` has written",
            param="base_head",
        )
    return msgspec.structs.replace(config, base_head=str(directory))


def model_name_of(config: ServeConfig, model_dir: Path) -> str:
    """What requests call the base model."""
    return config.served_model_name or (model_dir.name if config.model else DEFAULT_MODEL.name)
