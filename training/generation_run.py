"""A run that trains a LoRA for answers, and the head that drafts them: the task `generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .finish import finish
from .head_module import LookaheadHead, common_prefix_len, task_vocab
from .joint_loss import JointObjective
from .lora_model import LoraModel
from .objective import Objective
from .preflight import Prepared, prepare
from .run_config import RunConfig
from .task_run import PreparedRun
from .teacher_model import open_teacher


class GenerationRun(PreparedRun[Prepared]):
    """Phases: the LoRA alone, LoRA and head together, then what makes a servable adapter of it (finish.py)."""

    def __init__(self, prepared: Prepared):
        super().__init__(prepared)
        self._copy_start = common_prefix_len(prepared.examples)
        self._model: LoraModel | None = None
        self._head: LookaheadHead | None = None

    @classmethod
    def of(cls, config: RunConfig) -> GenerationRun:
        return cls(prepare(config))

    def objective(self, dtype: torch.dtype, device: torch.device) -> Objective | None:
        config, examples = self.config, self._prepared.examples
        model = self._model = LoraModel(self.model_dir, config.lora, dtype, device, config.head.tap_layer)
        if config.head.enabled:
            vocab = task_vocab(examples, config.head.vocab_size)
            head = LookaheadHead(model.hidden_size, config.head.hidden_size, vocab, config.head.copy_window)
            self._head = head.to(device)
        if config.lora.frozen:
            return None
        teacher = open_teacher(Path(config.teacher), model, self.model_dir) if config.teacher else None
        return JointObjective(config, model, self._head, examples, self._copy_start, len(self.plan), teacher)

    def finish(self) -> dict[str, Any] | None:
        assert self._model is not None
        model, self._model = self._model, None  # its memory is needed by then
        return finish(self._prepared, model, self._head, self._copy_start)
