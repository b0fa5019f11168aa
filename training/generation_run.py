"""A run that trains a LoRA for answers, and the head that drafts them, or the head alone: the task `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from ..text.special_tokens import eos_token_ids
from .data.dataset import Example, tokenize
from .data.rows import Row
from .finish import finish
from .head_fit import new_head
from .head_module import LookaheadHead, task_vocab
from .joint_loss import JointObjective
from .lora_model import CausalModel, LoraModel
from .objective import Objective, mean_loss
from .preflight import Prepared, prepare
from .run_config import RunConfig
from .task_run import PreparedRun
from .teacher_model import open_teacher


class GenerationRun(PreparedRun[Prepared]):
    """Phases: the LoRA alone, LoRA and head together, then what makes a servable adapter of it (finish.py)."""

    def __init__(self, prepared: Prepared):
        super().__init__(prepared)
        self._model: CausalModel | None = None
        self._head: LookaheadHead | None = None

    @classmethod
    def of(cls, config: RunConfig) -> GenerationRun:
        return cls(prepare(config))

    def objective(self, dtype: torch.dtype, device: torch.device) -> Objective | None:
        config, examples = self.config, self._prepared.examples
        if not config.lora.enabled:
            self._model = CausalModel(self.model_dir, dtype, device, config.head.tap_layer)
            return None
        model = self._model = LoraModel(self.model_dir, config.lora, dtype, device, config.head.tap_layer)
        if config.head.enabled:
            vocab = task_vocab(examples, config.head.vocab_size)
            self._head = new_head(model, config.head, vocab)
        if config.lora.frozen:
            return None
        teacher = open_teacher(Path(config.teacher), model, self.model_dir) if config.teacher else None
        return JointObjective(config, model, self._head, examples, self._prepared.copy_start, len(self.plan), teacher)

    def held_out_loss(self) -> float | None:
        rows = self._prepared.held_out[: self.config.eval.rows]
        return self._loss_of(rows) if rows and isinstance(self._model, LoraModel) else None

    def losses_on(self, rows: Sequence[Row]) -> tuple[float, float]:
        """Loss of a token of the answers of any `rows`, with the LoRA as it is, and of the base model without it."""
        eos = eos_token_ids(self.model_dir)
        examples = tokenize(rows, self._prepared.tokenizer, eos)
        assert isinstance(self._model, LoraModel)
        with_lora = self._loss_of(examples)
        with self._model.without_lora():
            return with_lora, self._loss_of(examples)

    def _loss_of(self, examples: Sequence[Example]) -> float:
        """Cross-entropy of a token with loss, whatever the run learns from."""
        assert isinstance(self._model, LoraModel)
        config = msgspec.structs.replace(self.config, loss="ce")
        objective = JointObjective(config, self._model, None, examples, self._prepared.copy_start, num_steps=1)
        with self._model.without_dropout():
            return mean_loss(objective, len(examples), config.optimizer.batch_tokens)

    def finish(self) -> dict[str, Any] | None:
        assert self._model is not None
        model, self._model = self._model, None  # its memory is needed by then
        return finish(self._prepared, model, self._head)
