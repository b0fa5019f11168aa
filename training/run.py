"""One training run from configuration to finished directory: a PEFT LoRA, its lookahead head and its task history.

Phases: the LoRA alone, LoRA and head together (trainer.py), answers of the finished adapter to its own training
prompts, the head fitted to those (head_fit.py), evaluation on held-out rows (evaluation/). Whatever exists after a
phase is a servable directory. Nothing is written before everything is checked (preflight.py) and the directory is held
(run_directory.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from tqdm import tqdm

from ..adapter_files import HEAD_CONFIG_FILE, HISTORY_FILE, TEXT_FILES, WEIGHTS_FILE
from ..drafters.head_files import (
    FORMAT_VERSION,
    LookaheadConfig,
    file_hash,
    read_config,
    write_head,
)
from ..drafters.task_history import TaskHistory
from ..errors import UserError
from ..model.fingerprint import base_fingerprint, tokenizer_fingerprint
from ..model.store import DEFAULT_MODEL
from ..whole_files import replace_file
from .checkpoint import CHECKPOINT_FILE, read_checkpoint
from .data.dataset import Example
from .evaluation.answers import answer, make_engine
from .evaluation.evaluate import evaluate_directory
from .evaluation.verdict import steps_warning
from .head_fit import anchors_of, collect_states, collect_teacher, fit_head
from .head_module import LookaheadHead, common_prefix_len, task_vocab
from .lora_files import LORA_FILES, check_finite, copy_files
from .lora_model import LoraModel, arithmetic
from .preflight import Prepared, prepare
from .processes import first_process
from .run_config import RunConfig
from .run_directory import RunDirectory, disk_errors, held_directory, started_as, state_of
from .run_identity import check_same_run, check_same_settings, run_identity
from .trainer import Trainer

CALIBRATION_ROWS = 16


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What became of a run."""

    output: Path
    was_finished: bool = False  # before; nothing was done
    report: dict[str, Any] | None = None  # None without held-out rows
    warnings: tuple[str, ...] = ()


def train_run(config: RunConfig, *, resume: bool = False) -> TrainResult | None:
    """Run all phases, or none if a resumed run is finished already. The first process returns what became of it.

    Raises `UserError` for what the user can fix, before anything is written where it can be known before.
    """
    makes_group = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if makes_group:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Losses are summed from the CPU, gradients on the device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    output = Path(config.output)
    directory: RunDirectory | None = None
    with ExitStack() as stack:

        def open_output() -> bool:
            nonlocal directory
            if resume and state_of(output) == "finished":
                check_same_settings(started_as(output), config, f"the finished run in {output}")
                return True
            directory = stack.enter_context(held_directory(output, resume))
            return False

        if first_process(open_output):
            result = TrainResult(output, was_finished=True)
        else:
            stack.enter_context(disk_errors(output))
            result = _train_and_finish(config, directory, resume, is_first)
    if makes_group:
        dist.destroy_process_group()
    return result if is_first else None


def _train_and_finish(config: RunConfig, directory: RunDirectory | None, resume: bool, is_first: bool) -> TrainResult:
    """`directory` is the first process's; the others only train."""
    output = Path(config.output)
    prepared = prepare(config)
    given, config = config, prepared.config
    examples, copy_start = prepared.examples, common_prefix_len(prepared.examples)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and dist.is_initialized():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    dtype = arithmetic(config.dtype, device)
    identity = run_identity(
        config,
        prepared.model_dir,
        examples,
        prepared.plan,
        uses_bf16=dtype == torch.bfloat16,
        num_processes=dist.get_world_size() if dist.is_initialized() else 1,
    )
    checkpoint = output / CHECKPOINT_FILE
    if resume and checkpoint.is_file():
        check_same_run(read_checkpoint(checkpoint)["identity"], identity, str(checkpoint))
    elif resume and directory is not None:
        check_same_settings(started_as(output), given, f"the run in {output}, which has no checkpoint yet,")
    if dist.is_initialized():
        dist.barrier()  # the others are as content before anything is written
    if directory is not None:
        directory.begin(given)
        for warning in prepared.warnings:
            tqdm.write(f"warning: {warning}")
    torch.manual_seed(config.seed)  # before the LoRA's random half is drawn
    model = LoraModel(prepared.model_dir, config.lora, dtype, device, config.head.tap_layer)
    head = None
    if config.head.enabled:
        vocab = task_vocab(examples, config.head.vocab_size)
        head = LookaheadHead(model.hidden_size, config.head.hidden_size, vocab, config.head.copy_window).to(device)
    if not config.lora.frozen:
        trainer = Trainer(config, model, head, examples, prepared.plan, copy_start, output, identity)
        if resume and checkpoint.is_file():
            trainer.resume()
        trainer.train()
    if dist.is_initialized():
        # Together: a process that leaves while another still talks to it can bring that one down.
        dist.barrier()
    report = _finish(prepared, model, head, copy_start) if is_first else None
    if report is not None:
        return TrainResult(output, report=report, warnings=tuple(report["warnings"]))
    num_steps = None if config.lora.frozen else len(prepared.plan)
    return TrainResult(output, warnings=tuple(steps_warning(num_steps, config.optimizer.min_steps)))


def _finish(prepared: Prepared, model: LoraModel, head: LookaheadHead | None, copy_start: int) -> dict[str, Any] | None:
    """Everything behind the steps: the LoRA's files, its head and history, and what they are worth."""
    config, model_dir, examples = prepared.config, prepared.model_dir, prepared.examples
    output = Path(config.output)
    source = Path(config.lora.adapter) if config.lora.adapter else None
    if source is not None:
        copy_files(source, output, TEXT_FILES)
    if config.lora.frozen:
        assert source is not None
        copy_files(source, output, LORA_FILES)
    else:
        # Without a path of this machine in it: peft loads the adapter by that name elsewhere.
        model.save(output, config.model or f"HuggingFaceTB/{DEFAULT_MODEL.name}")
        check_finite(output, config.optimizer.lr)
    if head is not None:
        answered = _self_answers(config, model_dir, output, examples)
        _finish_head(config, model, head, answered or examples, copy_start)
        _write(config, model_dir, output, model, head, copy_start, {})
        _write_history(config, output, _calibration_rows(config, examples)[1], answered)
        del model
        record = _calibrate(config, model_dir, output, examples)
        _rewrite_acceptance(output, record)
    report = None
    if config.data.eval and config.eval.rows:
        report = evaluate_directory(output, Path(config.data.eval), config.eval.rows, max_tokens=config.eval.max_tokens)
    (output / CHECKPOINT_FILE).unlink(missing_ok=True)
    return report


def _self_answers(config: RunConfig, model_dir: Path, output: Path, examples: Sequence[Example]) -> list[Example]:
    """Training prompts with what the finished adapter answers, drafted from the training completions."""
    chosen = examples[: config.distill.rows]
    if not chosen:
        return []
    TaskHistory.build([answer for e in examples for answer in e.answers], config.history.max_tokens or 100_000).save(
        output / HISTORY_FILE
    )
    engine = make_engine(model_dir, batch=16, max_len=_max_len(config))
    adapter = engine.load_adapter(output.name, output)
    prompts = [e.prompt for e in chosen]
    desc = "answers to training prompts"
    results = answer(engine, adapter.content_hash, prompts, config.distill.max_tokens, batch=16, desc=desc)
    (output / HISTORY_FILE).unlink()
    rate = results.num_tokens / results.seconds
    tqdm.write(f"{results.num_tokens} tokens at {rate:.0f} tokens/s, {results.mean_accepted_length:.2f} a verification")
    return [
        Example(e.prompt + a.tokens, [False] * len(e.prompt) + [True] * len(a.tokens), e.line)
        for e, a in zip(chosen, results.answers, strict=True)
        if len(a.tokens) > 1
    ]


def _max_len(config: RunConfig) -> int:
    """Tokens of the longest row and its answer."""
    assert config.data.max_len is not None
    return config.data.max_len + config.distill.max_tokens


def _finish_head(
    config: RunConfig, model: LoraModel, head: LookaheadHead, examples: Sequence[Example], copy_start: int
) -> None:
    last, tapped, starts = collect_states(model, examples, config.optimizer.batch_tokens)
    anchors = anchors_of(head, config.head, examples, starts, copy_start)
    teacher = None if config.head.loss == "ce" else collect_teacher(model, head, last)
    fit_head(head, config.head, last, tapped, anchors, config.distill.epochs, config.seed, teacher)


def _write(
    config: RunConfig,
    model_dir: Path,
    output: Path,
    model: LoraModel,
    head: LookaheadHead,
    copy_start: int,
    acceptance: dict[str, list[tuple[float, float]]],
) -> None:
    tensors = {name: value.detach().cpu() for name, value in head.named_parameters()}
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise UserError(f"the head diverged; lower head.lr ({config.head.lr}); the LoRA in {output} is complete")
    lookahead = LookaheadConfig(
        format_version=FORMAT_VERSION,
        base_hash=base_fingerprint(model_dir),
        tokenizer_hash=tokenizer_fingerprint(model_dir),
        lora_hash=file_hash(output / WEIGHTS_FILE),
        hidden_size=model.hidden_size,
        state_size=config.head.hidden_size,
        tap_layer=model.tap_layer,
        draft_len=config.head.draft_len,
        copy_window=config.head.copy_window,
        copy_start=copy_start,
        vocab=head.vocab,
        acceptance=acceptance,
    )
    write_head(output, lookahead, tensors)


def _write_history(config: RunConfig, output: Path, examples: Sequence[Example], answered: Sequence[Example]) -> None:
    """The adapter's own answers count as the newest, behind the answers that it learned from."""
    if not config.history.max_tokens:
        return
    own = {(e.line, e.prompt_len) for e in answered}
    learned = [e.answers[:-1] if (e.line, e.prompt_len) in own else e.answers for e in examples]
    answers = [answer for row in learned for answer in row] + [e.completion for e in answered]
    TaskHistory.build(answers, config.history.max_tokens).save(output / HISTORY_FILE)


def _calibration_rows(config: RunConfig, examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Rows that neither the head's last fit nor the history sees, and the others; too few rows are used for both."""
    num_spare = len(examples) - config.distill.rows
    if num_spare < 2 * CALIBRATION_ROWS:
        return list(examples[-CALIBRATION_ROWS:]), list(examples)
    return list(examples[-CALIBRATION_ROWS:]), list(examples[:-CALIBRATION_ROWS])


def _calibrate(
    config: RunConfig, model_dir: Path, output: Path, examples: Sequence[Example]
) -> dict[str, list[tuple[float, float]]]:
    """How often each source is right, seen on rows held back from them; they are all training rows of the LoRA."""
    prompts = [e.prompt for e in _calibration_rows(config, examples)[0]]
    engine = make_engine(model_dir, batch=8, max_len=_max_len(config))
    adapter = engine.load_adapter(output.name, output)
    answer(engine, adapter.content_hash, prompts, config.distill.max_tokens, batch=8, desc="answers for the record")
    lookahead = engine.registry.adapters[adapter.content_hash].lookahead
    if lookahead is None or lookahead.error:
        raise UserError(f"the finished head is refused: {lookahead.error if lookahead else 'no files'}")
    return lookahead.acceptance.dump()


def _rewrite_acceptance(output: Path, record: dict[str, list[tuple[float, float]]]) -> None:
    config = msgspec.structs.replace(read_config(output / HEAD_CONFIG_FILE), acceptance=record)
    replace_file(output / HEAD_CONFIG_FILE, lambda path: path.write_bytes(msgspec.json.encode(config)))
