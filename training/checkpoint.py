"""The file that a run goes on from: written whole or not at all, read with every fault named.

Knows nothing of what is in it beyond the fields; what a checkpoint is of stands in its `identity` (run_identity.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..whole_files import replace_file

CHECKPOINT_FILE = "checkpoint.pt"
_FIELDS = ("step", "health", "identity", "lora", "objective", "optimizer")


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replace `path`; the old file stays until the new one is on disk. Raises `OSError`."""

    def save(temporary: Path) -> None:
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
        except RuntimeError as error:  # torch says so of a file that takes no more
            reason = error.__context__ if isinstance(error.__context__, OSError) else str(error).partition("\n")[0]
            raise OSError(f"{temporary} could not be written: {reason}") from error

    replace_file(path, save, sync=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The fields, tensors on the CPU. Raises `UserError` for a file that is not a whole checkpoint of ours."""
    fix = "remove it and start again without --resume, in another --output or the emptied one"
    if not path.is_file():
        raise UserError(f"there is no {path} to resume from; leave --resume out")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged pickle raises has no end: IndexError, TypeError, ...
        reason = "it is empty" if not path.stat().st_size else str(error).partition("\n")[0]
        raise UserError(f"{path} is not a whole checkpoint ({reason}); {fix}") from None
    if not isinstance(state, dict) or any(field not in state for field in _FIELDS):
        raise UserError(f"{path} is of another version, or not a checkpoint of ours; {fix}")
    return state
