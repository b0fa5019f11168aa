"""How long a run will take and how much memory: by doing a little of each phase on this machine, with this model.

A few steps of the trainer, a forward, some steps of the head's fit and short answers are timed and scaled to the run's
tokens. Nothing is kept. What cannot be measured beforehand is assumed, and said: that answers are as long as those of
the rows, or as they may be where rows have none, and that drafts bring `_DRAFT_RATIO` times the speed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

from ..model.config import ModelConfig
from .data.batching import plan_epoch
from .data.dataset import Example
from .evaluation.answers import answer, make_engine
from .evaluation.evaluate import SINGLE_ROWS
from .finish import CALIBRATION_ROWS, num_answered
from .head_fit import anchors_of, collect_states, collect_teacher, fit_head, new_head
from .head_module import LookaheadHead, common_prefix_len, task_vocab
from .joint_loss import JointObjective
from .lora_model import CausalModel, LoraModel, arithmetic
from .preflight import Prepared
from .run_config import RunConfig
from .teacher_model import is_own_model, open_teacher
from .trainer import Trainer

_SAMPLE_TOKENS = 1024  # of what is trained on for the measurement
_FIT_EPOCHS = 2
_ANSWER_TOKENS = 12
_DRAFT_RATIO = 2.0


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    seconds: float


def estimate_phases(prepared: Prepared) -> list[Phase]:
    """The phases of a run in order, each with the seconds that it should take."""
    prepared = _answered(prepared)
    config, examples = prepared.config, prepared.examples
    device = _device()
    dtype = arithmetic(config.dtype, device)
    model = (
        LoraModel(prepared.model_dir, config.lora, dtype, device, config.head.tap_layer)
        if config.lora.enabled
        else CausalModel(prepared.model_dir, dtype, device, config.head.tap_layer)
    )
    sample = _sample(examples)
    phases, after = [], []
    head = None
    if config.head.enabled:
        vocab = task_vocab(examples, config.head.vocab_size)
        head = new_head(model, config.head, vocab)
    with tempfile.TemporaryDirectory() as folder:
        adapter = None
        if isinstance(model, LoraModel):
            adapter = Path(folder)
            model.save(adapter, "")
        if isinstance(model, LoraModel) and not config.lora.frozen:
            phases.append(Phase("training", _training_seconds(prepared, model, head, sample, Path(folder))))
        if head is not None:
            fitted = examples[: num_answered(config, len(examples))] or examples
            after = list(_head_phases(config, model, head, fitted, sample))
        del model
        return [*phases, *after, *_answer_phases(prepared, adapter, sample)]


def report_estimate(prepared: Prepared) -> None:
    """Print memory and time."""
    total, lora = _memory(prepared)
    click.echo(f"memory: about {total / 2**30:.1f} GiB ({lora / 1e6:.1f} M LoRA parameters)")
    click.echo("measuring a little of each phase ...")
    phases = [phase for phase in estimate_phases(prepared) if phase.seconds]
    for phase in phases:
        click.echo(f"  {phase.name}: {minutes(phase.seconds)}")
    is_trained = prepared.config.lora.is_trained  # a head alone takes other steps
    length = "distill.max_tokens" if prepared.open_lines else "those of the rows"
    steps = f" for {len(prepared.plan)} steps over {len(prepared.examples)} rows" if is_trained else ""
    click.echo(
        f"time: about {minutes(sum(phase.seconds for phase in phases))}{steps}"
        f", if answers are as long as {length} and drafts make them "
        f"{_DRAFT_RATIO:g} times as fast"
    )


def _training_seconds(
    prepared: Prepared, model: LoraModel, head: LookaheadHead | None, sample: Sequence[Example], folder: Path
) -> float:
    config, plan = prepared.config, prepared.plan
    same = [list(range(len(sample)))] * len(plan)
    teacher = open_teacher(Path(config.teacher), model, prepared.model_dir) if config.teacher else None
    objective = JointObjective(config, model, head, sample, common_prefix_len(sample), len(plan), teacher)
    trainer = Trainer(config, objective, same, folder, {})
    joint = (step for step in range(len(plan)) if head is not None and objective.schedule.head_weight(step))
    first_joint = next(joint, len(plan))
    trainer.train_step()  # the first one pays for what is made once
    seconds = 0.0
    for steps, number in ((plan[:first_joint], 0), (plan[first_joint:], first_joint)):
        if steps:
            trainer.step = number
            begin = time.perf_counter()
            trainer.train_step()
            per_token = (time.perf_counter() - begin) / _padded(sample)
            seconds += per_token * sum(_padded([prepared.examples[idx] for idx in batch]) for batch in steps)
    return seconds


def _head_phases(
    config: RunConfig, model: CausalModel, head: LookaheadHead, fitted: Sequence[Example], sample: Sequence[Example]
) -> Iterator[Phase]:
    """Hidden states of the rows that the head is fitted to, and the fit."""
    begin = time.perf_counter()
    last, tapped, starts = collect_states(model, sample, config.optimizer.batch_tokens, progress=False)
    seconds = time.perf_counter() - begin
    plan = plan_epoch([len(example.tokens) for example in fitted], config.optimizer.batch_tokens, 0)
    num_tokens = sum(_padded([fitted[idx] for idx in batch]) for batch in plan)
    yield Phase("hidden states for the head", seconds / _padded(sample) * num_tokens)
    anchors = anchors_of(head, config.head, sample, starts, 0)
    teacher = None if config.head.loss == "ce" else collect_teacher(model, head, last)
    begin = time.perf_counter()
    fit_head(head, config.head, last, tapped, anchors, _FIT_EPOCHS, 0, teacher, progress=False)
    seconds = (time.perf_counter() - begin) / (_FIT_EPOCHS * len(anchors))
    num_anchors = sum(len(example.completion) - 1 for example in fitted)
    yield Phase("fit of the head", seconds * config.distill.epochs * num_anchors)


def _answer_phases(prepared: Prepared, adapter: Path | None, sample: Sequence[Example]) -> Iterator[Phase]:
    """Answers to training prompts, for the head's record, and to held-out rows with drafts and without."""
    config = prepared.config
    answer_len = sum(len(e.completion) for e in prepared.examples) / len(prepared.examples)
    longest = max(len(e.prompt) for e in sample) + _ANSWER_TOKENS + 1
    engine = make_engine(prepared.model_dir, batch=8, max_len=longest)
    content_hash = engine.load_adapter(adapter.name, adapter).content_hash if adapter is not None else None
    seconds = {}
    for batch in (1, 8):
        prompts = [e.prompt for e in (list(sample) * batch)[:batch]]
        got = answer(engine, content_hash, prompts, _ANSWER_TOKENS, mode="off", batch=batch)
        prefill = (got.seconds - got.decode_seconds) / batch
        seconds[batch] = prefill, got.decode_seconds / max(1, got.decode_tokens)

    def each(batch: int, most: int, ratio: float) -> float:
        prefill, token = seconds[batch]
        return prefill + min(answer_len, most) * token / ratio

    if config.head.enabled:
        num_rows = len(prepared.examples)
        num_answers = min(num_answered(config, num_rows), num_rows) + min(CALIBRATION_ROWS, num_rows)
        yield Phase(
            f"{num_answers} answers to training prompts", num_answers * each(8, config.distill.max_tokens, _DRAFT_RATIO)
        )
    num_rows, most = min(config.eval.rows or 0, len(prepared.held_out)), config.eval.max_tokens
    num_single = min(num_rows, SINGLE_ROWS)
    yield Phase(
        f"{2 * (num_rows + num_single)} answers to held-out rows",
        sum(num_rows * each(8, most, ratio) + num_single * each(1, most, ratio) for ratio in (1.0, _DRAFT_RATIO)),
    )


def _answered(prepared: Prepared) -> Prepared:
    """With answers as long as they may be in place of stand-ins."""
    num = prepared.config.distill.max_tokens
    longer = [
        Example(e.prompt + e.completion[:1] * num, [False] * e.prompt_len + [True] * num, e.line)
        if e.line in prepared.open_lines
        else e
        for e in prepared.examples
    ]
    return replace(prepared, examples=longer)


def _sample(examples: Sequence[Example]) -> list[Example]:
    """Rows of the middle lengths, so many that they make a step's work measurable."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    middle = len(ordered[len(ordered) // 2].tokens)
    num_rows = max(1, min(len(ordered), _SAMPLE_TOKENS // middle))
    first = (len(ordered) - num_rows) // 2
    return ordered[first : first + num_rows]


def _padded(examples: Sequence[Example]) -> int:
    return len(examples) * max(len(example.tokens) for example in examples)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def minutes(seconds: float) -> str:
    """In words."""
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"


def _memory(prepared: Prepared) -> tuple[float, float]:
    """Bytes at the peak of training, and parameters of the LoRA."""
    config = prepared.config
    model = ModelConfig.from_dir(prepared.model_dir)
    bytes_each = arithmetic(config.dtype, _device()).itemsize
    weights = _num_weights(model)
    if config.teacher and is_own_model(Path(config.teacher), prepared.model_dir):
        weights += _num_weights(ModelConfig.from_dir(Path(config.teacher)))
    width = 2 * model.hidden_size + 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    width += 2 * model.hidden_size + 3 * (model.hidden_size + model.intermediate_size)
    lora = config.lora.r * width * model.num_layers if config.lora.enabled else 0
    activations = config.optimizer.batch_tokens * model.num_layers * 2 * width * bytes_each
    if model.attention_softcap is not None:  # attention that holds its weights: their caps, and they in fp32
        longest = max(len(example.tokens) for example in prepared.examples)
        activations += config.optimizer.batch_tokens * longest * model.num_heads * model.num_layers * 8
    targets = max(sum(sum(prepared.examples[idx].loss_mask[1:]) for idx in batch) for batch in prepared.plan)
    copies = 12 if bytes_each == 4 else 16  # bytes: logits, their logarithms and the gradient in fp32; bf16's beside it
    return weights * bytes_each + lora * 16 + activations + targets * model.vocab_size * copies, lora


def _num_weights(model: ModelConfig) -> int:
    per_layer = model.hidden_size * (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_layer += 3 * model.hidden_size * model.intermediate_size
    embeddings = model.hidden_size * model.vocab_size * (1 if model.tie_word_embeddings else 2)
    return per_layer * model.num_layers + embeddings
