"""What an adapter brings to draft with: its lookahead head, its task history, and the record of what was accepted.

Reads the files beside a PEFT LoRA. A file that is damaged, or that belongs to another base model, tokenizer or LoRA, is
refused with the reason, logged and reported; the LoRA is served without it. Nothing here can fail a load.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..adapter_files import (
    HEAD_CONFIG_FILE,
    HEAD_WEIGHTS_FILE,
    HISTORY_FILE,
    LOOKAHEAD_FILES,
    AdapterFiles,
    open_adapter,
)
from ..adapter_messages import LookaheadInfo
from ..drafters.acceptance import SharedAcceptance
from ..drafters.head_files import BARE_BASE, HeadError, LookaheadHeadFile, read_head
from ..drafters.history_file import HistoryError
from ..drafters.task_history import TaskHistory
from ..errors import UserError
from ..model.config import ModelConfig
from ..model.fingerprint import base_fingerprint, tokenizer_fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """The base model that heads must have been trained with."""

    model_hash: str
    tokenizer_hash: str

    @classmethod
    def of(cls, model_dir: Path) -> BaseIdentity:
        return cls(base_fingerprint(model_dir), tokenizer_fingerprint(model_dir))


@dataclass(frozen=True, slots=True)
class Lookahead:
    """Immutable but for `acceptance`, which learns."""

    head: LookaheadHeadFile | None
    history: TaskHistory | None
    acceptance: SharedAcceptance
    error: str | None

    @property
    def num_bytes(self) -> int:
        """Memory that head and history take, about."""
        head = self.head.num_bytes if self.head is not None else 0
        return head + (self.history.num_bytes if self.history is not None else 0)

    def copied(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> Lookahead:
        """With the head's weights where `copy` puts them; the history and what is learned are the same objects."""
        return replace(self, head=self.head.copied(copy)) if self.head is not None else self

    def info(self) -> LookaheadInfo:
        return LookaheadInfo(
            draft_len=self.head.config.draft_len if self.head is not None else None,
            history_tokens=self.history.num_tokens if self.history is not None else 0,
            error=self.error,
        )


def read_base_lookahead(directory: Path, config: ModelConfig, base: BaseIdentity) -> Lookahead:
    """What drafts for the base model itself, from a directory without a LoRA; nothing that is wrong in it is raised."""
    try:
        with open_adapter(directory, directory.name, names=LOOKAHEAD_FILES) as files:
            found = read_lookahead(files, BARE_BASE, directory.name, config, base)
        error = f"{directory} holds no lookahead head"
    except UserError as problem:
        found, error = None, str(problem)
    if found is None:
        logger.warning("the base model is served without a head: %s", error)
        return Lookahead(None, None, SharedAcceptance(), error)
    return found


def read_lookahead(
    files: AdapterFiles,
    lora_hash: str,
    name: str,
    config: ModelConfig,
    base: BaseIdentity,
) -> Lookahead | None:
    """Read `files` beside the LoRA of hash `lora_hash`; None when none of them is a lookahead's."""
    paths = files.paths
    if not paths.keys() & set(LOOKAHEAD_FILES):
        return None
    head, history, errors = None, None, []
    try:
        if paths.keys() & {HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE}:
            if missing := {HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE} - paths.keys():
                raise HeadError(f"{missing.pop()} is missing")
            head = read_head(
                paths[HEAD_CONFIG_FILE],
                paths[HEAD_WEIGHTS_FILE],
                weights_hash=files.digests[HEAD_WEIGHTS_FILE].hex(),
                lora_hash=lora_hash,
                base_hash=base.model_hash,
                tokenizer_hash=base.tokenizer_hash,
                hidden_size=config.hidden_size,
                num_layers=config.num_layers,
                vocab_size=config.vocab_size,
            )
    except (HeadError, OSError) as error:
        errors.append(f"its lookahead head is not used: {error}")
    try:
        if HISTORY_FILE in paths:
            history = TaskHistory.load(paths[HISTORY_FILE], vocab_size=config.vocab_size)
    except (HistoryError, OSError) as error:
        errors.append(f"its task history is not used: {error}")
    for message in errors:
        what = "the base model's head in" if lora_hash == BARE_BASE else "adapter"
        logger.warning("%s %r is served without drafts of its own: %s", what, name, message)
    acceptance = SharedAcceptance(head.config.acceptance if head is not None else None)
    return Lookahead(head, history, acceptance, "; ".join(errors) or None)
