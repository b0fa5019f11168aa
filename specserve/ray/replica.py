"""A replica's engine: of the settings and the model of this machine, started as the server starts its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from ..config import ServeConfig, engine_part
from ..server.engine_client.client import engine_command
from .engine_host import EngineHost


def engine_host(config: ServeConfig, model_dir: Path, roots: Sequence[Path] = ()) -> EngineHost:
    """Not started yet; it reads adapters below `roots`, anywhere where there are none."""
    settings = msgspec.structs.replace(engine_part(config), model=str(model_dir), adapter_roots=tuple(map(str, roots)))
    return EngineHost(config, settings, engine_command(config.log_level))
