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
    BARE_BASE,
    FORMAT_VERSION,
    LookaheadConfig,
    read_config,
    write_head,
)
from ..drafters.task_history import TaskHistory
from ..errors import UserError
from ..file_hash import file_hash
from ..model.fingerprint import base_fingerprint, tokenizer_fingerprint
from ..model.store import DEFAULT_MODEL
from ..routing_profile import write_profile
from ..whole_files import replace_file
from .checkpoint import CHECKPOINT_FILE
from .data.dataset import Example
from .evaluation.answers import Served, answer
from .evaluation.evaluate import evaluate_directory
from .head_fit import anchors_of, collect_states, collect_teacher, fit_head, new_head, with_jumps
from .head_module import LookaheadHead, task_vocab
from .health import RunCollapsed
from .lora_files import LORA_FILES, check_finite, copy_files, share_files
from .lora_model import CausalModel, LoraModel
from .preflight import Prepared, answers_itself
from .run_config import RunConfig

CALIBRATION_ROWS = 16
_ANSWERED_ROWS = 150


def finish(prepared: Prepared, model: CausalModel, head: LookaheadHead | None) -> dict[str, Any] | None:
    """Everything behind the steps: the LoRA's files, its head and history, and what they are worth.

    A `model` without a LoRA gets its head here: its words are those of its own answers.
    """
    config, model_dir, examples = prepared.config, prepared.model_dir, prepared.examples
    output = Path(config.output)
    source = Path(config.lora.adapter) if config.lora.adapter else None
    if source is not None:
        copy_files(source, output, TEXT_FILES)
    if source is not None and config.lora.frozen:
        copy_files(source, output, LORA_FILES)
    elif isinstance(model, LoraModel):
        # Without a path of this machine in it: peft loads the adapter by that name elsewhere.
        model.save(output, config.model or f"HuggingFaceTB/{DEFAULT_MODEL.name}")
        check_finite(output, config.optimizer.lr)
    if head is not None or not config.lora.enabled:
        answered = _self_answers(config, model_dir, output, examples)
        if not answered and answers_itself(config):
            raise UserError(
                "the base answered no training prompt with more than one token, so a head has nothing to learn; give "
                "other rows, or raise distill.temperature or distill.max_tokens",
                param="data",
            )
        with_head = with_jumps(config.head, answered or examples, prepared.copy_start)
        config = msgspec.structs.replace(config, head=with_head)
        if head is None:
            vocab = task_vocab(answered or examples, config.head.vocab_size)
            head = new_head(model, config.head, vocab)
        _fit_to_answers(config, model, head, answered or examples, prepared.copy_start)
        _write_head(config, model_dir, output, model, head, prepared.copy_start)
        learned_from = [] if answers_itself(config) else _calibration_rows(config, examples)[1]
        _write_history(config, output, learned_from, answered)
        del model
        record = _calibrate(config, model_dir, output, examples)
        rewrite_acceptance(output, record)
    if prepared.profile.prompts and config.lora.enabled:
        write_profile(output, prepared.profile)
    share_files(output)
    report = None
    if config.data.eval and config.eval.rows:
        report = evaluate_directory(output, Path(config.data.eval), config.eval.rows, max_tokens=config.eval.max_tokens)
    (output / CHECKPOINT_FILE).unlink(missing_ok=True)
    return report


def _self_answers(config: RunConfig, model_dir: Path, output: Path, examples: Sequence[Example]) -> list[Example]:
    """Training prompts with what the finished adapter answers, drafted from the training completions."""
    chosen = examples[: num_answered(config, len(examples))]
    if not chosen:
        return []
    TaskHistory.build([answer for e in examples for answer in e.answers], config.history.max_tokens or 100_000).save(
        output / HISTORY_FILE
    )
    served = Served.of(model_dir, output, batch=16, max_len=_max_len(config))
    prompts = [e.prompt for e in chosen]
    results = answer(
        served.engine,
        served.adapter_hash,
        prompts,
        config.distill.max_tokens,
        batch=16,
        temperature=config.distill.temperature,
        desc="answers to training prompts",
    )
    (output / HISTORY_FILE).unlink()
    rate = results.num_tokens / results.seconds
    tqdm.write(f"{results.num_tokens} tokens at {rate:.0f} tokens/s, {results.mean_accepted_length:.2f} a verification")
    return results.answered(chosen)


def num_answered(config: RunConfig, num_rows: int) -> int:
    """How many training prompts are answered; a head of the bare base learns of nothing else, so all but a few."""
    if config.distill.rows is not None:
        return config.distill.rows
    return _ANSWERED_ROWS if config.lora.enabled else max(num_rows - 2 * CALIBRATION_ROWS, _ANSWERED_ROWS)


def _max_len(config: RunConfig) -> int:
    """Tokens of the longest row and its answer."""
    assert config.data.max_len is not None
    return config.data.max_len + config.distill.max_tokens


def _fit_to_answers(
    config: RunConfig, model: CausalModel, head: LookaheadHead, examples: Sequence[Example], copy_start: int
) -> None:
    last, tapped, starts = collect_states(model, examples, config.optimizer.batch_tokens)
    anchors = anchors_of(head, config.head, examples, starts, copy_start)
    teacher = None if config.head.loss == "ce" else collect_teacher(model, head, last)
    fit_head(head, config.head, last, tapped, anchors, config.distill.epochs, config.seed, teacher)


def _write_head(
    config: RunConfig,
    model_dir: Path,
    output: Path,
    model: CausalModel,
    head: LookaheadHead,
    copy_start: int,
) -> None:
    """With an empty record of acceptance: it is made with the head in use."""
    check_head(head, config.head.lr)
    lookahead = LookaheadConfig(
        format_version=FORMAT_VERSION,
        base_hash=base_fingerprint(model_dir),
        tokenizer_hash=tokenizer_fingerprint(model_dir),
        lora_hash=file_hash(output / WEIGHTS_FILE) if config.lora.enabled else BARE_BASE,
        hidden_size=model.hidden_size,
        state_size=config.head.hidden_size,
        tap_layer=model.tap_layer,
        draft_len=config.head.draft_len,
        copy_window=config.head.copy_window,
        copy_start=copy_start,
        copy_jumps=bool(config.head.copy_jumps),
        vocab=head.vocab,
        acceptance={},
    )
    write_head(output, lookahead, head.tensors())


def check_head(head: LookaheadHead, rate: float) -> None:
    """Raises `RunCollapsed` for a head that no server takes."""
    if not all(bool(torch.isfinite(value).all()) for value in head.parameters()):
        raise RunCollapsed(f"the head diverged; lower head.lr ({rate})")


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
    num_spare = len(examples) - num_answered(config, len(examples))
    if num_spare < 2 * CALIBRATION_ROWS:
        return list(examples[-CALIBRATION_ROWS:]), list(examples)
    return list(examples[-CALIBRATION_ROWS:]), list(examples[:-CALIBRATION_ROWS])


def _calibrate(
    config: RunConfig, model_dir: Path, output: Path, examples: Sequence[Example]
) -> dict[str, list[tuple[float, float]]]:
    """How often each source is right, seen on rows held back from them; they are all training rows of the LoRA."""
    prompts = [e.prompt for e in _calibration_rows(config, examples)[0]]
    served = Served.of(model_dir, output, batch=8, max_len=_max_len(config))
    distill, desc = config.distill, "answers for the record"
    answer(served.engine, served.adapter_hash, prompts, distill.max_tokens, temperature=distill.temperature, desc=desc)
    lookahead = served.lookahead
    if lookahead is None or lookahead.error:
        raise UserError(f"the finished head is refused: {lookahead.error if lookahead else 'no files'}")
    return lookahead.acceptance.dump()


def rewrite_acceptance(output: Path, record: dict[str, list[tuple[float, float]]]) -> None:
    """Put the record of how often each source is right into a head's configuration."""
    config = msgspec.structs.replace(read_config(output / HEAD_CONFIG_FILE), acceptance=record)
    replace_file(output / HEAD_CONFIG_FILE, lambda path: path.write_bytes(msgspec.json.encode(config)))
