"""Everything about a run that can be known before it trains or writes: said first, and all of it here.

Reads the base model's configuration, the adapter to start from, and the rows of both files; changes nothing. What needs
no model is checked with the configuration (run_file.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from ..adapter_files import CONFIG_FILE
from ..adapters.lora import read_adapter
from ..adapters.served_base import ServedBase
from ..compute.device_choice import choose_device
from ..config import EngineConfig
from ..errors import AdapterError, UserError
from ..model.config import ModelConfig
from ..model.fingerprint import tokenizer_fingerprint
from ..model.shapes import stored_parents
from ..model.store import resolve_model
from ..model.weights import checked_source
from ..routing_profile import RoutingProfile, profile_of
from ..text.special_tokens import eos_token_ids
from ..text.tokenizer import TextTokenizer
from .data.batching import default_epochs, plan_run
from .data.dataset import Example, read_rows, shared_prompts, tokenize
from .data.rows import routed_texts
from .data.teacher_logits import TopLogits, logits_file, read_teacher_logits
from .head_fit import with_jumps
from .head_module import common_prefix_len
from .run_config import ALL_LINEAR, LoraConfig, RunConfig
from .run_file import check_ready
from .teacher_model import check_teacher

_SHOWN = 5
_MAX_LEN = 1024
_EVAL_ROWS = 40


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run works on. `config` has no open defaults left: what follows from model or rows is filled in."""

    config: RunConfig
    model_dir: Path
    tokenizer: TextTokenizer
    examples: list[Example]  # those of at most data.max_len tokens
    held_out: list[Example]
    plan: list[list[int]]  # indices into `examples`, step by step
    warnings: list[str]
    profile: RoutingProfile  # of the rows that are in `examples`
    copy_start: int  # tokens that all prompts of `examples` start with
    open_lines: frozenset[int]  # of training rows whose last answer is a stand-in


def prepare(config: RunConfig) -> Prepared:
    """Check all there is to check. Raises `UserError` naming the setting, its value, the limit and the fix."""
    check_ready(config)
    model_dir = resolve_model(config.model)
    model = ModelConfig.from_dir(model_dir)
    checked_source(model_dir, model)
    check_targets(config.lora, model)
    config = settled(config, model)
    max_len = config.data.max_len
    assert max_len is not None
    if config.lora.adapter:
        check_adapter(Path(config.lora.adapter), model_dir, "lora.adapter")
    tokenizer = tokenizer_of(config, model_dir)
    eos = eos_token_ids(model_dir)
    rows = read_rows(config.data.train, config.data.max_rows, may_be_open=answers_itself(config))
    examples = tokenize(rows, tokenizer, eos, config.data.system, model.vocab_size)
    if config.loss != "ce":
        examples = _with_teacher(config, examples, [row.line for row in rows], model_dir, model)
    examples = [e for e in examples if len(e.tokens) <= max_len]
    if not examples:
        raise UserError(f"every row is longer than data.max_len ({max_len} tokens)", param="data.max_len")
    warnings = []
    if num_left_out := len(rows) - len({e.line for e in examples}):
        warnings.append(f"{num_left_out} of {len(rows)} rows are longer than data.max_len and left out")
    held_out = []
    if config.data.eval and config.eval.rows:
        held_rows = read_rows(config.data.eval, may_be_open=not config.lora.enabled)
        held_out = tokenize(held_rows, tokenizer, eos, config.data.system, model.vocab_size)
        check_held_out(held_out, config.data.eval, model)
        warnings += _overlap(examples, held_out)
    copy_start = common_prefix_len(examples)
    if config.head.enabled and not answers_itself(config):  # else by the answers that the base will give
        head = with_jumps(config.head, examples, copy_start)
        config = msgspec.structs.replace(config, head=head)
    config, plan = planned(config, [len(e.tokens) for e in examples])
    kept = {e.line for e in examples}
    texts = routed_texts([row for row in rows if row.line in kept], config.data.system)
    profile = profile_of(texts, config.routing.prompts)
    open_lines = frozenset(row.line for row in rows if row.is_open)
    return Prepared(config, model_dir, tokenizer, examples, held_out, plan, warnings, profile, copy_start, open_lines)


def tokenizer_of(config: RunConfig, model_dir: Path) -> TextTokenizer:
    """What the run's rows are read with: of the adapter that it begins with, if that brings one, and on its day."""
    tokenizer = TextTokenizer(model_dir)
    if config.lora.adapter:
        tokenizer = tokenizer.for_adapter_in(Path(config.lora.adapter))
    return tokenizer.on(config.data.date)


def answers_itself(config: RunConfig) -> bool:
    """Whether nothing is learned from the rows' answers, as the base model gives others."""
    return not config.lora.enabled and config.distill.rows != 0


def planned(config: RunConfig, lengths: Sequence[int], least_rows: int = 1) -> tuple[RunConfig, list[list[int]]]:
    """`config` with its number of epochs, and the rows of each step, at least so many, as indices into `lengths`."""
    opt = config.optimizer
    if opt.epochs is None:
        epochs = default_epochs(lengths, opt.batch_tokens, config.seed, opt.min_steps, opt.min_rows)
        opt = msgspec.structs.replace(opt, epochs=epochs)
        config = msgspec.structs.replace(config, optimizer=opt)
    assert opt.epochs is not None
    return config, plan_run(lengths, opt.batch_tokens, config.seed, opt.epochs, opt.max_steps, least_rows)


def settled(config: RunConfig, model: ModelConfig) -> RunConfig:
    """`config` with what follows from the base model, checked against it."""
    tap, layers = config.head.tap_layer, model.num_layers
    if config.head.enabled and tap is not None and tap >= layers:
        raise UserError(
            f"head.tap_layer is {tap}, but the base model has {layers} layers: give 0 to {layers - 1}, or leave it out "
            f"for the middle one ({layers // 2})",
            param="head.tap_layer",
        )
    if config.eval.rows is None:
        config = msgspec.structs.replace(config, eval=msgspec.structs.replace(config.eval, rows=_EVAL_ROWS))
    if config.data.max_len is None:
        data = msgspec.structs.replace(config.data, max_len=min(_MAX_LEN, model.max_position_embeddings))
        return msgspec.structs.replace(config, data=data)
    if config.data.max_len > model.max_position_embeddings:
        raise UserError(
            f"data.max_len is {config.data.max_len} tokens, but the base model has {model.max_position_embeddings} "
            f"positions: give at most {model.max_position_embeddings} (--set data.max_len=...)",
            param="data.max_len",
        )
    return config


def _with_teacher(
    config: RunConfig, examples: list[Example], lines: Sequence[int], model_dir: Path, model: ModelConfig
) -> list[Example]:
    """The examples of all rows with what the file beside them knows of a teacher, unless a directory is one."""
    own = Path(config.lora.adapter or "")
    tokenizer_dir = own if config.lora.adapter and (own / "tokenizer.json").is_file() else model_dir
    if config.teacher:
        assert config.data.max_len is not None
        check_teacher(Path(config.teacher), tokenizer_dir, config.data.max_len)
        if (Path(config.teacher) / CONFIG_FILE).is_file():
            check_adapter(Path(config.teacher), model_dir, "teacher")
        return examples
    file = Path(config.data.train)
    tops = read_teacher_logits(file, tokenizer_fingerprint(tokenizer_dir), model.vocab_size)
    if len(tops) < len(lines) or (len(tops) > len(lines) and config.data.max_rows is None):
        raise UserError(
            f"{logits_file(file)} is of {len(tops)} rows, {file} has {len(lines)}; make the logits again",
            param="data.train",
        )
    found = list(_matched(examples, dict(zip(lines, tops, strict=False)), file))
    num_without = sum(example.teacher is None for example in found)
    if config.loss == "kl" and num_without:
        raise UserError(
            f"loss is kl, but {num_without} of {len(found)} answers have no teacher's logits in {logits_file(file)}: "
            "give loss mixed, which learns these from their text, or leave the rows out",
            param="loss",
        )
    return found


def _matched(examples: Sequence[Example], tops: Mapping[int, TopLogits], file: Path) -> Iterator[Example]:
    """The examples, whose rows may have several, with their part of their row's logits."""
    for line, group in itertools.groupby(examples, key=lambda example: example.line):
        row, top, start = list(group), tops[line], 0
        lengths = [sum(example.loss_mask[1:]) for example in row]
        if len(top) and len(top) != sum(lengths):
            raise UserError(
                f"{file} line {line}: its answers have {sum(lengths)} tokens with the model's chat template, its "
                f"teacher's logits {len(top)}; make the logits again with this model's template",
                param="data.train",
            )
        for example, length in zip(row, lengths, strict=True):
            part = TopLogits(top.ids[start : start + length], top.logprobs[start : start + length])
            yield replace(example, teacher=part) if len(top) else example
            start += length


def check_targets(lora: LoraConfig, model: ModelConfig) -> None:
    """Raises `UserError` for modules that other models have."""
    there = {*stored_parents(model), "embed_tokens", "lm_head"}
    for name in lora.target_modules if lora.target_modules != ALL_LINEAR else ():
        if name not in there:
            raise UserError(
                f"lora.target_modules holds {name!r}, which a {model.architecture} does not have; its linears are "
                f"{', '.join(stored_parents(model))}",
                param="lora.target_modules",
            )


def check_adapter(path: Path, model_dir: Path, setting: str) -> None:
    """With the eyes of the server: what it would refuse can be learned from no more than it can be served."""
    base = ServedBase.of_files(model_dir, choose_device(EngineConfig()))
    base = replace(base, identity=None)  # a head beside it is trained anew
    try:
        read_adapter(path, base)
    except AdapterError as error:
        raise UserError(f"{setting}: {error}", param=setting, code=error.code) from None


def check_held_out(held_out: Sequence[Example], file: str, model: ModelConfig) -> None:
    """Raises `UserError` for a row whose prompt leaves no room for an answer."""
    limit = model.max_position_embeddings - 1
    for example in held_out:
        if example.prompt_len > limit:
            raise UserError(
                f"{file} line {example.line}: the prompt has {example.prompt_len} tokens, but the base model has "
                f"{model.max_position_embeddings} positions; shorten it or leave it out",
                param="data.eval",
            )


def _overlap(train: Sequence[Example], held_out: Sequence[Example]) -> list[str]:
    found = shared_prompts(train, held_out)
    if not found:
        return []
    shown = ", ".join(f"line {a} is held-out line {b}" for a, b in found[:_SHOWN])
    more = ", ..." if len(found) > _SHOWN else ""
    return [
        f"{len(found)} training prompts are in data.eval too ({shown}{more}): what is measured on these rows says "
        "nothing about new ones"
    ]
