"""What `LLM(...)` may be told, as the settings that flags of the same names give to the server.

Owns which of them mean something without HTTP, and where the defaults differ: one program asks, with as many prompts as
it likes, so nothing is refused for being too much and nothing is given up for taking long. Reads no environment.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from os import PathLike
from typing import Any

from ..config import EngineConfig, ServeConfig
from ..errors import UserError
from ..settings import parse, settings_of

SERVER_OPTIONS = (
    "adapters_dir",
    "served_model_name",
    "tool_format",
    "request_timeout_s",
    "engine_timeout_s",
    "engine_step_timeout_s",
    "log_level",
)
_NEVER_S = 1e9
_DEFAULTS: dict[str, Any] = {
    "max_waiting": 1 << 20,
    "max_waiting_tokens": 1 << 40,
    "request_timeout_s": _NEVER_S,
    "highest_priority": -1000,
    "log_level": "warning",
}


def config_of(model: str | PathLike[str] | None, options: Mapping[str, Any]) -> ServeConfig:
    """The settings of an engine for one program. Raises `UserError` naming option, value and limit."""
    known = {
        setting.name: setting
        for setting in settings_of(ServeConfig)
        if setting.name in EngineConfig.__struct_fields__ or setting.name in SERVER_OPTIONS
    }
    values = dict(_DEFAULTS)
    for name, value in {"model": model, **options}.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
            raise UserError(f"LLM has no option {name!r}; {hint}", param=name)
        if value is not None:
            values[name] = parse(known[name], _plain(value), "LLM(...)", is_text=False)
    return ServeConfig(**values)


def _plain(value: Any) -> Any:
    """Paths as texts."""
    if isinstance(value, PathLike):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
