"""Everything about a run of embed, rerank or classify that can be known before it trains or writes.

Owns the defaults that follow from task and model, and the description of the adapter (pooling_config.json) before it is
calibrated. Reads configuration, rows and the adapter to start from; changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import torch.distributed as dist

from ...adapter_files import CONFIG_FILE, WEIGHTS_FILE
from ...adapter_kinds import Question
from ...adapters.pooling_config import MAX_OUTPUTS, PoolingConfig, parse_pooling_config
from ...errors import AdapterError, UserError
from ...model.architectures import ARCHITECTURES
from ...model.config import ModelConfig
from ...model.store import resolve_model
from ...model.weights import checked_source
from ..preflight import check_adapter, check_targets, planned, tokenizer_of
from ..run_config import RunConfig
from ..run_file import check_ready
from .examples import ClassifyExample, EmbedExample, ExampleEncoder, PoolingExample
from .model import FEATURE_EXTRACTION, SEQ_CLS
from .questions import left_out, questions_of
from .rows import PoolingRow, PoolingTask, read_pooling_rows

_MAX_LEN = 512
_LEAST_ROWS = {"embed": 2}  # of a step: one alone has no negatives
_FEW_ROWS = 8  # of a step of embed: so few negatives teach little
_PREFIXES = {"rerank": ("Query: ", "\nDocument: ")}
_SECTIONS = ("head", "joint", "distill", "history")  # of the task generate alone
_OWN_SECTIONS = ("embed", "rerank", "classify")


@dataclass(frozen=True, slots=True)
class PreparedPooling:
    """What a run works on; `config` has no open defaults left."""

    config: RunConfig
    task: PoolingTask
    model_dir: Path
    shape: PoolingConfig
    encoder: ExampleEncoder
    examples: list[PoolingExample]
    calibration: list[PoolingExample]  # rows that only calibrate; of classify
    held_out: list[PoolingExample]
    plan: list[list[int]]  # indices into `examples`, step by step
    warnings: list[str]


def prepare_pooling(config: RunConfig) -> PreparedPooling:
    """Check all there is to check. Raises `UserError` naming the setting, its value, the limit and the fix."""
    check_ready(config)
    check_sections(config)
    if config.task == "embed" and dist.is_initialized():
        raise UserError(
            "task 'embed' trains in one process, as the documents of a step are each other's negatives; start it "
            "without torchrun",
            param="task",
        )
    task = cast(PoolingTask, config.task)
    model_dir = resolve_model(config.model)
    model = ModelConfig.from_dir(model_dir)
    checked_source(model_dir, model)
    check_targets(config.lora, model)
    config = settled_pooling(config, model)
    rows = read_pooling_rows(config.data.train, task, config.data.max_rows)
    questions = questions_for(config, rows)
    shape = checked_shape(config, questions)
    if config.lora.adapter:
        check_adapter(Path(config.lora.adapter), model_dir, "lora.adapter")
        _check_kind(Path(config.lora.adapter), task, sum(len(question.labels) for question in questions))
    encoder = ExampleEncoder(tokenizer_of(config, model_dir), shape, model.vocab_size)
    examples, held_out, warnings = _encoded(config, encoder, rows, questions)
    examples, calibration = _split(config, examples)
    config, plan, few = _planned(config, examples)
    return PreparedPooling(
        config, task, model_dir, shape, encoder, examples, calibration, held_out, plan, warnings + few
    )


def _encoded(
    config: RunConfig, encoder: ExampleEncoder, rows: Sequence[PoolingRow], questions: Sequence[Question]
) -> tuple[list[PoolingExample], list[PoolingExample], list[str]]:
    """Rows to learn from, held-out ones, and what is to be said of them."""
    examples = encoder.examples(rows, config.data.train, questions)
    warnings = [
        f"question {name!r}: {num} labels of fewer than {config.classify.min_label_rows} rows are left out"
        for name, num in (left_out(rows, questions) if questions else {}).items()  # type: ignore[arg-type]
    ]
    held_out = []
    if config.data.eval and config.eval.rows != 0:
        held_rows = read_pooling_rows(config.data.eval, cast(PoolingTask, config.task), config.eval.rows)
        held_out = encoder.examples(held_rows, config.data.eval, questions)
        warnings += overlap_warning(examples, held_out)
    learned = [e for e in examples if not is_open(e)]
    if num_open := len(examples) - len(learned):
        warnings.append(f"{num_open} training rows answer no question with a label that is learned, and are left out")
    return learned, held_out, warnings


def _planned(config: RunConfig, examples: Sequence[PoolingExample]) -> tuple[RunConfig, list[list[int]], list[str]]:
    """`config` with its epochs, the rows of each step, and what is to be said of these."""
    lengths, least = [_length(example, config) for example in examples], _LEAST_ROWS.get(config.task, 1)
    if len(examples) < least:
        raise UserError(
            f"data.train has {len(examples)} rows to learn from; {least} are the least to {config.task}",
            param="data.train",
        )
    config, plan = planned(config, lengths, least)
    mean_rows = sum(map(len, plan)) / len(plan)
    if config.task != "embed" or mean_rows >= _FEW_ROWS:
        return config, plan, []
    return (
        config,
        plan,
        [
            f"a step has {mean_rows:.1f} rows in the mean, so each query few other documents to be told from; raise "
            f"optimizer.batch_tokens ({config.optimizer.batch_tokens}) or lower data.max_len ({config.data.max_len})"
        ],
    )


def check_sections(config: RunConfig) -> None:
    """Raises `UserError` for settings that say nothing of this task: they were meant to do something."""
    unused = [*_SECTIONS, *(name for name in _OWN_SECTIONS if name != config.task)]
    for name in unused:
        section, default = getattr(config, name), getattr(RunConfig(), name)
        changed = [field for field in section.__struct_fields__ if getattr(section, field) != getattr(default, field)]
        if changed and not (name == "head" and not section.enabled):
            raise UserError(
                f"{name}.{changed[0]} is {getattr(section, changed[0])!r}, which says nothing of task {config.task!r}; "
                "leave it out",
                param=f"{name}.{changed[0]}",
            )
    if config.lora.frozen:
        raise UserError(f"--head-only: task {config.task!r} has no lookahead head; leave it out", param="lora.frozen")
    if config.data.system is not None:
        raise UserError(
            f"data.system: task {config.task!r} has no conversations; use pooling.query_prefix", param="data.system"
        )
    if "lm_head" in config.lora.target_modules:
        raise UserError(
            f"lora.target_modules names lm_head, which task {config.task!r} has none of", param="lora.target_modules"
        )


def _has_score(model: ModelConfig) -> bool:
    """Whether transformers has the model with a score head in place of the lm_head."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as with_score

    return ARCHITECTURES[model.architecture].model_type in with_score


def settled_pooling(config: RunConfig, model: ModelConfig) -> RunConfig:
    """`config` with what follows from task and model, checked against these."""
    if config.task != "embed" and not _has_score(model):
        raise UserError(
            f"task {config.task!r} trains transformers' model with a score head, which it has none of for "
            f"{model.architecture}; task 'embed' can be trained on it",
            param="task",
        )
    limit = model.max_position_embeddings
    if config.data.max_len is not None and config.data.max_len > limit:
        raise UserError(
            f"data.max_len is {config.data.max_len} tokens, but the base model has {limit} positions: give at most "
            f"{limit} (--set data.max_len=...)",
            param="data.max_len",
        )
    data = msgspec.structs.replace(config.data, max_len=config.data.max_len or min(_MAX_LEN, limit))
    dims = config.embed.dimensions
    if any(not 1 <= dim <= model.hidden_size for dim in dims):
        raise UserError(
            f"embed.dimensions is {list(dims)}; the base model's vectors have {model.hidden_size} numbers, so 1 to "
            f"{model.hidden_size} are expected",
            param="embed.dimensions",
        )
    embed = msgspec.structs.replace(config.embed, dimensions=tuple(sorted(set(dims))))
    first, second = _PREFIXES.get(config.task, ("", ""))
    given = config.pooling
    pooling = msgspec.structs.replace(
        given,
        type=given.type or ("mean" if config.task == "embed" else "last"),
        query_prefix=first if given.query_prefix is None else given.query_prefix,
        document_prefix=second if given.document_prefix is None else given.document_prefix,
    )
    return msgspec.structs.replace(config, data=data, embed=embed, pooling=pooling)


def questions_for(config: RunConfig, rows: Sequence[PoolingRow]) -> tuple[Question, ...]:
    """Of classify; none of others."""
    if config.task != "classify":
        return ()
    return questions_of(rows, config.classify.min_label_rows, config.data.train)  # type: ignore[arg-type]


def shape_of(config: RunConfig, questions: Sequence[Question]) -> PoolingConfig:
    """What pooling_config.json says of a settled run."""
    pooling, is_paired = config.pooling, config.task in ("embed", "rerank")
    assert pooling.type is not None
    if config.task == "classify" and (pooling.query_prefix or pooling.document_prefix):
        raise UserError(
            "pooling.query_prefix and pooling.document_prefix say nothing of task 'classify', whose texts are as they "
            "come; leave them out, or use pooling.suffix",
            param="pooling",
        )
    return PoolingConfig(
        adapter_type=config.task,
        pooling=pooling.type,
        dimensions=config.embed.dimensions,
        questions=tuple(questions),
        query_prefix=(pooling.query_prefix or "") if is_paired else "",
        document_prefix=(pooling.document_prefix or "") if is_paired else "",
        suffix=pooling.suffix,
        append_eos=pooling.append_eos,
        max_tokens=config.data.max_len,
    )


def checked_shape(config: RunConfig, questions: Sequence[Question]) -> PoolingConfig:
    """`shape_of`, with the eyes of the server. Raises `UserError` for what it would refuse."""
    shape = shape_of(config, questions)
    num_outputs = sum(len(question.labels) for question in questions)
    if num_outputs > MAX_OUTPUTS:
        raise UserError(
            f"the questions have {num_outputs} labels, and {MAX_OUTPUTS} are the most that are served; raise "
            f"classify.min_label_rows ({config.classify.min_label_rows})",
            param="classify.min_label_rows",
        )
    try:
        return parse_pooling_config("of this run", msgspec.json.encode(shape))
    except AdapterError as error:
        raise UserError(f"what would be served cannot be: {error}", param="pooling") from None


def is_open(example: PoolingExample) -> bool:
    """Whether nothing of a row to classify is known."""
    return isinstance(example, ClassifyExample) and all(target is None for target in example.targets)


def overlap_warning(examples: Sequence[PoolingExample], held_out: Sequence[PoolingExample]) -> list[str]:
    """A training row whose texts are a held-out one's."""
    lines = {tuple(example.texts): example.line for example in held_out}
    found = [(e.line, lines[tuple(e.texts)]) for e in examples if tuple(e.texts) in lines]
    if not found:
        return []
    shown = ", ".join(f"line {a} is held-out line {b}" for a, b in found[:5]) + (", ..." if len(found) > 5 else "")
    return [f"{len(found)} training rows are in data.eval too ({shown}): what is measured says nothing about new ones"]


def _split(config: RunConfig, examples: list[PoolingExample]) -> tuple[list[PoolingExample], list[PoolingExample]]:
    """(rows to train on, rows to calibrate on)."""
    num = int(len(examples) * config.classify.calibration_share) if config.task == "classify" else 0
    chosen = set(random.Random(config.seed).sample(range(len(examples)), num))
    return [e for i, e in enumerate(examples) if i not in chosen], [examples[i] for i in sorted(chosen)]


def _length(example: PoolingExample, config: RunConfig) -> int:
    """Tokens that a row brings into a step, the documents that are mined for it included."""
    lengths = [len(text) for text in example.texts]
    if isinstance(example, EmbedExample):
        return sum(lengths) + config.embed.mined_negatives * lengths[1]
    return len(lengths) * max(lengths)


def _check_kind(path: Path, task: PoolingTask, num_outputs: int) -> None:
    """The adapter to go on from must be of the same kind, with as many outputs. Raises `UserError`."""
    from safetensors import safe_open

    wanted: Any = FEATURE_EXTRACTION if task == "embed" else SEQ_CLS
    has = msgspec.json.decode((path / CONFIG_FILE).read_bytes()).get("task_type")
    if has != wanted:
        raise UserError(
            f"lora.adapter: {path} has task_type {has!r}, and task {task!r} goes on from {wanted!r}; leave it out to "
            "begin with a new one",
            param="lora.adapter",
        )
    num_outputs = 1 if task == "rerank" else num_outputs
    with safe_open(path / WEIGHTS_FILE, framework="pt") as file:
        found = [file.get_slice(name).get_shape()[0] for name in file.keys() if "score" in name]
    if task != "embed" and found != [num_outputs]:
        raise UserError(
            f"lora.adapter: the score matrix in {path} has {found[0] if found else 0} outputs, and the rows need "
            f"{num_outputs}; train on rows with the same questions and labels",
            param="lora.adapter",
        )
