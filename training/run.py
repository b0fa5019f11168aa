"""One training run from configuration to finished directory: a PEFT LoRA, its lookahead head and its task history.

Phases: the LoRA alone, LoRA and head together (trainer.py), answers of the finished adapter to its own training
prompts, the head fitted to those (head_fit.py), evaluation on held-out rows (evaluate.py). Whatever exists after a
phase is a servable directory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from ..drafters.head_files import (
    FORMAT_VERSION,
    HISTORY_FILE,
    LookaheadConfig,
    file_hash,
    write_head,
)
from ..drafters.task_history import TaskHistory
from ..errors import UserError
from ..model.fingerprint import base_fingerprint, tokenizer_fingerprint
from ..model_store import DEFAULT_MODEL, resolve_model
from ..special_tokens import eos_token_ids
from ..tokenizer import TextTokenizer
from .answers import answer, make_engine
from .batching import plan_run
from .dataset import Example, read_rows, tokenize
from .evaluate import evaluate_directory
from .head_fit import anchors_of, collect_states, collect_teacher, fit_head
from .head_module import LookaheadHead, common_prefix_len, task_vocab
from .lora_model import LoraModel
from .run_config import RunConfig
from .run_file import save_resolved
from .trainer import CHECKPOINT_FILE, Trainer

RUN_FILE = "run.yaml"
_CALIBRATION_ROWS = 16


def train_run(config: RunConfig, *, resume: bool = False, head_only: bool = False) -> Path:
    """Run all phases; returns the output directory. Raises `UserError` for what the user can fix."""
    if head_only and not config.lora.adapter:
        raise UserError("--head-only needs --adapter DIR, the LoRA that gets a head", param="lora.adapter")
    makes_group = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if makes_group:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    output = Path(config.output)
    _prepare_output(output, resume, is_first)
    if dist.is_initialized():
        dist.barrier()  # the others open files in the directory that the first one makes
    model_dir = resolve_model(config.model)
    tokenizer = TextTokenizer(model_dir)
    eos = min(eos_token_ids(model_dir))
    rows = read_rows(config.data.train)[: config.data.max_rows]
    examples = [e for e in tokenize(rows, tokenizer, eos, config.data.system) if len(e.tokens) <= config.data.max_len]
    if not examples:
        raise UserError(f"every row is longer than data.max_len ({config.data.max_len} tokens)", param="data.max_len")
    if len(examples) < len(rows):
        tqdm.write(f"{len(rows) - len(examples)} of {len(rows)} rows are longer than data.max_len and left out")
    if is_first:
        save_resolved(config, output / RUN_FILE)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and dist.is_initialized():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    use_bf16 = config.dtype == "bf16" or (config.dtype == "auto" and device.type == "cuda")
    torch.manual_seed(config.seed)  # before the LoRA's random half is drawn
    model = LoraModel(
        model_dir, config.lora, torch.bfloat16 if use_bf16 else torch.float32, device, config.head.tap_layer
    )
    head = None
    copy_start = common_prefix_len(examples)
    if config.head.enabled:
        vocab = task_vocab(examples, config.head.vocab_size)
        head = LookaheadHead(model.hidden_size, config.head.hidden_size, vocab, config.head.copy_window).to(device)
    if not head_only:
        opt = config.optimizer
        lengths = [len(example.tokens) for example in examples]
        plan = plan_run(lengths, opt.batch_tokens, config.seed, opt.epochs, opt.max_steps)
        trainer = Trainer(config, model, head, examples, plan, copy_start, output)
        if resume and (output / CHECKPOINT_FILE).is_file():
            trainer.resume()
        trainer.run()
    if makes_group:
        # Together: a process that leaves while another still talks to it can bring that one down.
        dist.barrier()
        dist.destroy_process_group()
    if not is_first:
        return output
    # Without a path of this machine in it: peft loads the adapter by that name elsewhere.
    model.save(output, config.model or f"HuggingFaceTB/{DEFAULT_MODEL.name}")
    if head is not None:
        answered = _self_answers(config, model_dir, output, examples, eos)
        _finish_head(config, model, head, answered or examples, copy_start)
        _write(config, model_dir, output, model, head, copy_start, {})
        _write_history(config, output, _calibration_rows(config, examples)[1], answered)
        del model
        record = _calibrate(config, model_dir, output, examples)
        _rewrite_acceptance(output, record)
    if config.data.eval and config.eval.rows:
        evaluate_directory(output, Path(config.data.eval), config.eval.rows, max_tokens=config.eval.max_tokens)
    (output / CHECKPOINT_FILE).unlink(missing_ok=True)
    return output


def _prepare_output(output: Path, resume: bool, is_first: bool) -> None:
    if resume or not is_first:
        return
    if output.is_dir() and any(output.iterdir()):
        fix = "go on with --resume" if (output / CHECKPOINT_FILE).is_file() else "give another --output or remove it"
        raise UserError(f"the output directory {output} is not empty; {fix}", param="output")
    output.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(output).free < 200 << 20:
        raise UserError(f"less than 200 MiB are free at {output}", param="output")


def _self_answers(
    config: RunConfig, model_dir: Path, output: Path, examples: Sequence[Example], eos: int
) -> list[Example]:
    """Training prompts with what the finished adapter answers, drafted from the training completions."""
    chosen = examples[: config.distill.rows]
    if not chosen:
        return []
    TaskHistory.build([e.completion for e in examples], config.history.max_tokens or 100_000).save(
        output / HISTORY_FILE
    )
    engine = make_engine(model_dir, batch=16, max_len=config.data.max_len + config.distill.max_tokens)
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
        lora_hash=file_hash(output / "adapter_model.safetensors"),
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
    """The adapter's own answers count as the newest, behind the completions that it learned from."""
    if not config.history.max_tokens:
        return
    own = {e.line for e in answered}
    completions = [e.completion for e in examples if e.line not in own] + [e.completion for e in answered]
    TaskHistory.build(completions, config.history.max_tokens).save(output / HISTORY_FILE)


def _calibration_rows(config: RunConfig, examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Rows that neither the head's last fit nor the history sees, and the others; too few rows are used for both."""
    num_spare = len(examples) - config.distill.rows
    if num_spare < 2 * _CALIBRATION_ROWS:
        return list(examples[-_CALIBRATION_ROWS:]), list(examples)
    return list(examples[-_CALIBRATION_ROWS:]), list(examples[:-_CALIBRATION_ROWS])


def _calibrate(
    config: RunConfig, model_dir: Path, output: Path, examples: Sequence[Example]
) -> dict[str, list[tuple[float, float]]]:
    """How often each source is right, seen on rows held back from them; they are all training rows of the LoRA."""
    prompts = [e.prompt for e in _calibration_rows(config, examples)[0]]
    engine = make_engine(model_dir, batch=8, max_len=config.data.max_len + config.distill.max_tokens)
    adapter = engine.load_adapter(output.name, output)
    answer(engine, adapter.content_hash, prompts, config.distill.max_tokens, batch=8, desc="answers for the record")
    ahead = engine.registry.adapters[adapter.content_hash].lookahead
    if ahead is None or ahead.error:
        raise UserError(f"the finished head is refused: {ahead.error if ahead else 'no files'}")
    return ahead.acceptance.dump()


def _rewrite_acceptance(output: Path, record: dict[str, list[tuple[float, float]]]) -> None:
    import msgspec

    from ..drafters.head_files import CONFIG_FILE, read_config, replace_file

    config = msgspec.structs.replace(read_config(output), acceptance=record)
    replace_file(output / CONFIG_FILE, lambda path: path.write_bytes(msgspec.json.encode(config)))
