"""What follows the steps of a run: the LoRA's files, its head and history, and what they are worth.

The finished adapter answers its own training prompts, the head is fitted to those answers, a record of how often each
source is right is made on rows that neither the fit nor the history has seen, and held-out rows are evaluated. Whatever
exists after each of these is a servable directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
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
from ..routing_profile import write_profile
from ..whole_files import replace_file
from .checkpoint import CHECKPOINT_FILE
from .data.dataset import Example
from .evaluation.answers import answer, make_engine
from .evaluation.evaluate import evaluate_directory
from .head_fit import anchors_of, collect_states, collect_teacher, fit_head
from .head_module import LookaheadHead
from .health import RunCollapsed
from .lora_files import LORA_FILES, check_finite, copy_files, share_files
from .lora_model import LoraModel
from .preflight import Prepared
from .run_config import RunConfig

CALIBRATION_ROWS = 16


def finish(prepared: Prepared, model: LoraModel, head: LookaheadHead | None, copy_start: int) -> dict[str, Any] | None:
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
        _fit_to_answers(config, model, head, answered or examples, copy_start)
        _write_head(config, model_dir, output, model, head, copy_start)
        _write_history(config, output, _calibration_rows(config, examples)[1], answered)
        del model
        record = _calibrate(config, model_dir, output, examples)
        _rewrite_acceptance(output, record)
    if prepared.profile.prompts:
        write_profile(output, prepared.profile)
    share_files(output)
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
    return results.answered(chosen)


def _max_len(config: RunConfig) -> int:
    """Tokens of the longest row and its answer."""
    assert config.data.max_len is not None
    return config.data.max_len + config.distill.max_tokens


def _fit_to_answers(
    config: RunConfig, model: LoraModel, head: LookaheadHead, examples: Sequence[Example], copy_start: int
) -> None:
    last, tapped, starts = collect_states(model, examples, config.optimizer.batch_tokens)
    anchors = anchors_of(head, config.head, examples, starts, copy_start)
    teacher = None if config.head.loss == "ce" else collect_teacher(model, head, last)
    fit_head(head, config.head, last, tapped, anchors, config.distill.epochs, config.seed, teacher)


def _write_head(
    config: RunConfig,
    model_dir: Path,
    output: Path,
    model: LoraModel,
    head: LookaheadHead,
    copy_start: int,
) -> None:
    """With an empty record of acceptance: it is made with the head in use."""
    tensors = {name: value.detach().cpu() for name, value in head.named_parameters()}
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise RunCollapsed(f"the head diverged; lower head.lr ({config.head.lr}); the LoRA in {output} is complete")
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
        acceptance={},
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
