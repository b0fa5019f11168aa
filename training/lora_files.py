"""A LoRA's files as they lie in a directory: copied byte for byte, and checked and shared once they are written."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file

from ..adapter_files import CONFIG_FILE, HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE, HISTORY_FILE, WEIGHTS_FILE
from .health import RunCollapsed

LORA_FILES = (CONFIG_FILE, WEIGHTS_FILE)


def copy_files(source: Path, directory: Path, names: Iterable[str]) -> None:
    """Those of `names` that are in `source`."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def share_files(directory: Path) -> None:
    """Let whoever may read the LoRA's configuration, or a base head's, read what belongs to it.

    A server may run as another user; safetensors, and whatever writes histories, make files for their own user alone.
    """
    config = next(directory / name for name in (CONFIG_FILE, HEAD_CONFIG_FILE) if (directory / name).exists())
    for name in (WEIGHTS_FILE, HEAD_WEIGHTS_FILE, HISTORY_FILE):
        if (directory / name).exists():
            shutil.copymode(config, directory / name)


def check_finite(directory: Path, rate: float) -> None:
    """Raises `RunCollapsed` if the LoRA as stored holds a value that no server takes, and removes its weights then."""
    path = directory / WEIGHTS_FILE
    bad = [name for name, value in load_file(path).items() if not bool(torch.isfinite(value).all())]
    if bad:
        path.unlink()
        raise RunCollapsed(
            f"the trained LoRA holds NaN or infinite values ({bad[0]} and {len(bad) - 1} more): it diverged; lower "
            f"optimizer.lr ({rate}) and start again in another --output",
            param="optimizer.lr",
        )
