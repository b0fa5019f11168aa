"""What a LoRA that a run goes on from says of itself: peft takes that, whatever the run's own settings would be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..adapter_files import CONFIG_FILE
from ..adapters.peft_matching import DEFAULT_TARGETS
from ..errors import UserError
from ..model.shapes import LINEARS
from .run_config import ALL_LINEAR


class _Saved(msgspec.Struct):
    """As peft writes it."""

    r: int
    lora_alpha: int | float
    target_modules: str | list[str] | None = None


def adapter_settings(directory: str) -> dict[str, Any]:
    """Dotted key -> value of the settings that the LoRA in `directory` has in place of a run's.

    Nothing of a directory that cannot be read: what is wrong with it is said by the checks before a run.
    """
    try:
        saved = msgspec.json.decode((Path(directory) / CONFIG_FILE).read_bytes(), type=_Saved)
    except (OSError, msgspec.DecodeError):
        return {}
    return {"lora.r": saved.r, "lora.alpha": saved.lora_alpha, "lora.target_modules": _modules(saved.target_modules)}


def _modules(saved: str | Sequence[str] | None) -> str | tuple[str, ...]:
    names = DEFAULT_TARGETS if saved is None else saved
    if isinstance(names, str):
        return names
    return ALL_LINEAR if set(names) == set(LINEARS) else tuple(sorted(names))


def check_not_others(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raises `UserError` for a setting that is `given` beside an adapter which has it otherwise."""
    for key, value in known.items():
        wanted = given.get(key, value)
        if (tuple(wanted) if isinstance(wanted, list) else wanted) != value:
            raise UserError(
                f"{key} is {wanted!r}, but the LoRA of lora.adapter has {value!r} and keeps it: leave {key} out, or "
                "train a new LoRA without --adapter",
                param=key,
            )
