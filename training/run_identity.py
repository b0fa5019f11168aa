"""What the losses of a run depend on, by name, so that a checkpoint goes on only in the run that it is of.

Settings stand under their dotted keys; what they lead to (base model, rows as tokens, plan of the steps) as hashes.
Settings that no step of the trainer reads are left out: they may change between an interruption and `--resume`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from ..adapter_files import content_hash
from ..errors import UserError
from ..model.fingerprint import base_fingerprint, tokenizer_fingerprint
from .run_config import RunConfig
from .run_file import absolute, flatten
from .teacher_model import teacher_identity

# Where things lie, and what is done before and after the steps. Files are in the identity by their content.
_UNREAD = ("output", "model", "data.train", "data.eval", "lora.adapter", "teacher", "head.draft_len")
_UNREAD_SECTIONS = ("distill", "history", "checkpoint", "eval")
_SHOWN = 5
_HASH_LEN = 12

Identity = dict[str, Any]


class TrainedRow(Protocol):
    @property
    def content(self) -> bytes:
        """All of the row that a loss depends on; no two different rows have the same."""
        ...


def run_identity(
    config: RunConfig,
    model_dir: Path,
    rows: Sequence[TrainedRow],
    plan: Sequence[Sequence[int]],
    *,
    uses_bf16: bool = False,
    num_processes: int = 1,
) -> Identity:
    """Name -> value of everything that a step's loss is a function of, the step's number aside."""
    settings = {
        key: value
        for key, value in flatten(msgspec.to_builtins(config))
        if key not in _UNREAD and key.partition(".")[0] not in _UNREAD_SECTIONS
    }
    adapter = Path(config.lora.adapter) if config.lora.adapter else None
    return {
        **settings,
        "dtype": "bf16" if uses_bf16 else "fp32",
        "the base model": base_fingerprint(model_dir)[:_HASH_LEN],
        "the tokenizer": tokenizer_fingerprint(model_dir)[:_HASH_LEN],
        "the content of lora.adapter": content_hash(adapter)[:_HASH_LEN] if adapter else None,
        "the teacher": teacher_identity(Path(config.teacher))[:_HASH_LEN] if config.teacher else None,
        "the training rows as tokens": _hash_of_rows(rows),
        "the number of steps": len(plan),
        "the rows of the steps": _hash_of_lists(plan),
        "the number of processes": num_processes,
    }


def check_same_run(saved: Mapping[str, Any], here: Mapping[str, Any], what: str) -> None:
    """Raises `UserError` that names what differs, the value in `what` and the value here."""
    names = [*here, *(name for name in saved if name not in here)]
    found = [name for name in names if saved.get(name) != here.get(name)]
    if not found:
        return
    shown = [f"{name} was {saved.get(name)!r} and is {here.get(name)!r}" for name in found[:_SHOWN]]
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    raise UserError(
        f"{what} is of another run: {'; '.join(shown)}{more}; resume with what it was started with, or give another "
        "--output",
        param=found[0],
    )


def check_same_settings(saved: RunConfig, here: RunConfig, what: str) -> None:
    """The same for two configurations; where the result goes and how often it is saved on the way may differ."""
    check_same_run(_settings(saved), _settings(here), what)


def _settings(config: RunConfig) -> dict[str, Any]:
    ignored = ("output", "checkpoint.every_steps")
    return {key: value for key, value in flatten(absolute(config)) if key not in ignored}


def _hash_of_rows(rows: Sequence[TrainedRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.content).to_bytes(8, "little"))
        digest.update(row.content)
    return digest.hexdigest()[:_HASH_LEN]


def _hash_of_lists(plan: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for batch in plan:
        digest.update(len(batch).to_bytes(8, "little"))
        digest.update(array("q", batch).tobytes())
    return digest.hexdigest()[:_HASH_LEN]
