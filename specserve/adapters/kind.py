"""What an adapter is for, by its configurations and the shapes of its tensors: nothing of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..adapter_files import CONFIG_FILE, WEIGHTS_FILE, check_complete, open_adapter
from ..adapter_kinds import AdapterType
from ..errors import AdapterError
from .peft_config import decode_config
from .pooling_config import SCORE, adapter_type_of, read_pooling_config


def adapter_type_at(directory: Path) -> AdapterType:
    """Of the adapter in `directory`. Raises `AdapterError`."""
    with open_adapter(directory, directory.name) as files:
        check_complete(files, directory, directory.name)
        return adapter_type_in(directory.name, files.paths)


def adapter_type_in(name: str, paths: Mapping[str, Path]) -> AdapterType:
    """Of adapter `name`, whose files `check_complete` has seen. Raises `AdapterError`."""
    config = decode_config(name, paths[CONFIG_FILE].read_bytes())
    task_type = config.get("task_type")
    score = tensor_shapes(name, paths[WEIGHTS_FILE]).get(SCORE)
    return adapter_type_of(
        name,
        task_type if isinstance(task_type, str) else None,
        read_pooling_config(name, paths),
        tuple(score) if score is not None else None,
    )


def tensor_shapes(name: str, weights: Path) -> dict[str, list[int]]:
    """The shapes in the weights file of adapter `name`. Raises `AdapterError`."""
    import safetensors

    try:
        with safetensors.safe_open(weights, framework="np") as tensors:
            return {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"adapter {name!r}: {WEIGHTS_FILE} is not readable as safetensors: {error}") from None
