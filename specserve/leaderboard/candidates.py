"""A model of the leaderboard as it lies on the disk now: its base's directory, its adapter's files, their hashes."""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec

from ..adapter_files import CONFIG_FILE, POOLING_FILE, check_complete, open_adapter
from ..adapters.pooling_config import FEATURE_EXTRACTION, SEQ_CLS, parse_pooling_config
from ..errors import UserError
from ..model.fingerprint import base_fingerprint, tokenizer_fingerprint
from ..model.store import resolve_model
from ..strict_json import decode_json
from ..training.run_file import began_on
from .entries import Kind, Model, StoredModel, Task

_FORMAT = 1  # of how answers are made; another one makes them anew


@dataclass(frozen=True, slots=True)
class Candidate:
    """`identity` is another one whenever the answers might be."""

    number: int
    name: str
    model: Model
    model_dir: Path
    identity: str
    content_hash: str | None  # of the adapter
    day: datetime.date | None = None  # that its chat template takes for today

    @property
    def adapter(self) -> Path | None:
        return Path(self.model.adapter) if self.model.adapter is not None else None

    def config_hash(self, task: Task) -> str:
        """Of all that an answer depends on beside its prompt: the model and how it is decoded."""
        settings = {"format": _FORMAT, "model": self.identity, "temperature": 0, "max_tokens": task.max_tokens}
        return hashlib.sha256(msgspec.json.encode(settings, order="deterministic")).hexdigest()


def candidate(stored: StoredModel) -> Candidate:
    """Raises `UserError` where base or adapter cannot be read."""
    model_dir = resolve_model(stored.model.base)
    parts = [base_fingerprint(model_dir), tokenizer_fingerprint(model_dir)]
    content_hash = day = None
    if stored.model.adapter is not None:
        content_hash, text_hash = _adapter_hashes(Path(stored.model.adapter))
        day = began_on(Path(stored.model.adapter))
        parts += [content_hash, str(text_hash), *([day.isoformat()] if day is not None else [])]
    return Candidate(stored.number, stored.name, stored.model, model_dir, " ".join(parts), content_hash, day)


def checked_model(base: str, adapter: Path | None) -> Model:
    """What the leaderboard keeps of a model that is added. Raises `UserError`."""
    if base and Path(base).expanduser().is_dir():
        base = str(Path(base).expanduser().resolve())
    if adapter is None:
        return Model(base=base)
    if not (adapter / CONFIG_FILE).is_file():
        raise UserError(f"--adapter: {adapter} is not a PEFT directory ({CONFIG_FILE} is missing)", param="adapter")
    kind: Kind = "generate"
    if (adapter / POOLING_FILE).is_file():
        shape = parse_pooling_config(adapter.name, (adapter / POOLING_FILE).read_bytes())
        kind = cast(Kind, shape.adapter_type)
    elif _task_type(adapter / CONFIG_FILE) in (SEQ_CLS, FEATURE_EXTRACTION):
        raise UserError(
            f"--adapter: {adapter} does not generate and has no {POOLING_FILE}, which says how it is measured; "
            "`specserve train` writes one",
            param="adapter",
        )
    _adapter_hashes(adapter)
    return Model(base=base, adapter=str(adapter.resolve()), adapter_kind=kind)


def _adapter_hashes(directory: Path) -> tuple[str, str | None]:
    """Of its weights and of its template and tokenizer. Raises `UserError` for one that is not whole."""
    with open_adapter(directory, directory.name) as files:
        check_complete(files, directory, directory.name)
        return files.content_hash, files.text_hash


def _task_type(path: Path) -> Any:
    content = decode_json(path.read_bytes(), str(path))
    return content.get("task_type") if isinstance(content, dict) else None
