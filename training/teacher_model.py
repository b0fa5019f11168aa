"""A frozen teacher beside the model that is trained: its logits at the tokens of answers, computed in each step.

It reads the student's prompts token for token, so both must name tokens alike. A teacher on the student's own base
shares its weights: another adapter, or the bare base. Owns what a directory of a teacher may be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from ..adapter_files import CONFIG_FILE, content_hash
from ..errors import ModelError, UserError
from ..model.config import ModelConfig
from ..model.fingerprint import base_fingerprint, tokenizer_fingerprint
from ..model.weights import checked_source
from .data.dataset import Example
from .lora_model import CausalModel, LoraModel, quiet_peft

_NAME = "teacher"


class Teacher(Protocol):
    def logits(self, batch: Sequence[Example]) -> torch.Tensor:
        """[R, V] in fp32 at the tokens with loss of `batch`, without a gradient."""
        ...


class OwnTeacher:
    """Another model."""

    def __init__(self, model: CausalModel):
        self._model = model

    @torch.no_grad()
    def logits(self, batch: Sequence[Example]) -> torch.Tensor:
        return self._model.logits(self._model.hidden(batch).last).float()


class SharedTeacher:
    """The student's base with the adapter in `adapter`, or bare."""

    def __init__(self, student: LoraModel, adapter: Path | None):
        self._student, self._has_adapter = student, adapter is not None
        if adapter is not None:
            with quiet_peft(), student.without_dropout():  # peft would leave it so
                student.peft.load_adapter(str(adapter), _NAME)

    @torch.no_grad()
    def logits(self, batch: Sequence[Example]) -> torch.Tensor:
        with self._student.without_dropout(), self._in_place():
            return self._student.logits(self._student.hidden(batch).last).float()

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        peft = self._student.peft
        if not self._has_adapter:
            with peft.disable_adapter():
                yield
            return
        peft.set_adapter(_NAME, inference_mode=True)
        try:
            yield
        finally:
            peft.set_adapter("default")


def open_teacher(directory: Path, student: LoraModel, model_dir: Path) -> Teacher:
    """The teacher in a directory that `check_teacher` has passed."""
    if is_own_model(directory, model_dir):
        return OwnTeacher(CausalModel(directory, student.dtype, student.device))
    return SharedTeacher(student, directory if (directory / CONFIG_FILE).is_file() else None)


def is_own_model(directory: Path, model_dir: Path) -> bool:
    """Whether a teacher brings weights of a base."""
    return not (directory / CONFIG_FILE).is_file() and base_fingerprint(directory) != base_fingerprint(model_dir)


def teacher_identity(directory: Path) -> str:
    """What tells one teacher from another."""
    return content_hash(directory) if (directory / CONFIG_FILE).is_file() else base_fingerprint(directory)


def check_teacher(directory: Path, tokenizer_dir: Path, max_len: int) -> None:
    """Raises `UserError` for what can be no teacher of a student whose tokenizer is in `tokenizer_dir`.

    An adapter is checked as the server would (preflight.py); here is what is left.
    """
    is_adapter = (directory / CONFIG_FILE).is_file()
    if not is_adapter and not (directory / "config.json").is_file():
        raise UserError(
            f"teacher is {directory}, which holds neither a model (config.json) nor an adapter ({CONFIG_FILE}); name a "
            "local directory of either (for a hosted teacher, `specserve distill` makes rows and logits of it)",
            param="teacher",
        )
    if is_adapter and not (directory / "tokenizer.json").is_file():
        return
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"teacher: {directory} has no tokenizer.json, so its tokens are unknown", param="teacher")
    theirs, ours = tokenizer_fingerprint(directory), tokenizer_fingerprint(tokenizer_dir)
    if theirs != ours:
        raise UserError(
            f"teacher: {directory} has another tokenizer ({theirs[:12]}) than the model that is trained ({ours[:12]}), "
            "so its probabilities are of other tokens; take a teacher of the same family, or train on its answers "
            "alone (loss: ce)",
            param="teacher",
        )
    if is_adapter:
        return
    try:
        model = ModelConfig.from_dir(directory)
        checked_source(directory, model)
    except ModelError as error:
        raise UserError(f"teacher: {directory}: {error}", param="teacher") from None
    positions = model.max_position_embeddings
    if max_len > positions:
        raise UserError(
            f"data.max_len is {max_len} tokens, but the teacher in {directory} has {positions} positions: give at most "
            f"{positions} (--set data.max_len={positions})",
            param="data.max_len",
        )
