"""A run of embed, rerank or classify: its objective, and what follows its steps.

The directory is a plain PEFT adapter with pooling_config.json beside it; a classifier's probabilities are calibrated
before that is written, on rows that its weights have not seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import torch

from ...adapter_files import POOLING_FILE, TEXT_FILES
from ...model.store import DEFAULT_MODEL
from ...whole_files import replace_file
from ..checkpoint import CHECKPOINT_FILE
from ..data.batching import epoch_starts
from ..lora_files import check_finite, copy_files, share_files
from ..objective import Objective, mean_loss
from ..run_config import RunConfig
from ..task_run import PreparedRun
from .calibration import calibrated
from .classes import ClassifyObjective
from .contrastive import ContrastiveObjective
from .evaluate import evaluate_pooling
from .examples import ClassifyExample, EmbedExample, PoolingExample, RerankExample
from .model import PoolingModel
from .prepare import PreparedPooling, prepare_pooling
from .ranking import RankingObjective


class PoolingRun(PreparedRun[PreparedPooling]):
    def __init__(self, prepared: PreparedPooling):
        super().__init__(prepared)
        self._model: PoolingModel | None = None

    @classmethod
    def of(cls, config: RunConfig) -> PoolingRun:
        return cls(prepare_pooling(config))

    def objective(self, dtype: torch.dtype, device: torch.device) -> Objective:
        prepared = self._prepared
        model = self._model = PoolingModel(
            self.model_dir, self.config.lora, prepared.shape.pooling, num_outputs_of(prepared), dtype, device
        )
        return objective_of(prepared, model, prepared.examples, prepared.plan)

    def held_out_loss(self) -> float | None:
        assert self._model is not None
        prepared = self._prepared
        if not prepared.held_out:
            return None
        objective = objective_of(prepared, self._model, prepared.held_out, prepared.plan)
        with self._model.evaluating():
            return mean_loss(objective, len(prepared.held_out), self.config.optimizer.batch_tokens)

    def finish(self) -> dict[str, Any] | None:
        assert self._model is not None
        prepared, model, output = self._prepared, self._model, Path(self.config.output)
        config = self.config
        if config.lora.adapter:
            copy_files(Path(config.lora.adapter), output, TEXT_FILES)
        model.round_as_saved()
        shape, uncalibrated = prepared.shape, prepared.shape.questions
        if prepared.calibration:
            rows = cast(list[ClassifyExample], prepared.calibration)
            outputs = model.for_all([e.tokens for e in rows], config.optimizer.batch_tokens, scored=True)
            questions = calibrated(shape.questions, outputs, [e.targets for e in rows])
            shape = msgspec.structs.replace(shape, questions=questions)
        model.save(output, config.model or f"HuggingFaceTB/{DEFAULT_MODEL.name}")
        check_finite(output, config.optimizer.lr)
        content = msgspec.json.format(msgspec.json.encode(shape), indent=1) + b"\n"
        replace_file(output / POOLING_FILE, lambda path: path.write_bytes(content))
        share_files(output)
        del model
        self._model, report = None, None  # the engine has its own
        if prepared.held_out:
            report = evaluate_pooling(
                output,
                self.model_dir,
                shape,
                config,
                prepared.held_out,
                _corpus(prepared),
                uncalibrated,
                config.data.eval or "",
            )
        (output / CHECKPOINT_FILE).unlink(missing_ok=True)
        return report


def objective_of(
    prepared: PreparedPooling, model: PoolingModel, examples: Sequence[PoolingExample], plan: Sequence[Sequence[int]]
) -> Objective:
    """Of the run's task, over `examples` and the steps of `plan`."""
    config, num_steps = prepared.config, len(plan)
    if prepared.task == "embed":
        rows = cast(Sequence[EmbedExample], examples)
        return ContrastiveObjective(config, model, rows, num_steps, epoch_starts(plan))
    if prepared.task == "rerank":
        return RankingObjective(config, model, cast(Sequence[RerankExample], examples), num_steps)
    questions = prepared.shape.questions
    return ClassifyObjective(config, model, cast(Sequence[ClassifyExample], examples), num_steps, questions)


def num_outputs_of(prepared: PreparedPooling) -> int | None:
    """Rows of the score matrix; None of embed."""
    if prepared.task == "embed":
        return None
    return sum(len(question.labels) for question in prepared.shape.questions) if prepared.task == "classify" else 1


def _corpus(prepared: PreparedPooling) -> list[tuple[int, ...]]:
    """Documents of training rows, to be searched beside the held-out ones."""
    chosen = prepared.examples[: prepared.config.eval.corpus_rows]
    return [e.positive for e in chosen if isinstance(e, EmbedExample)]
