"""pooling_config.json, which may stand beside a PEFT LoRA: what it is for, how it pools, what its outputs mean.

Owns the file's format, and what PEFT's `task_type` means where there is none: SEQ_CLS classifies, or re-ranks where its
score matrix has one row, by the last token, as transformers does; FEATURE_EXTRACTION embeds by the last token, to
length 1, as vLLM does; anything else generates. File, task type and weights must agree; whatever does not is refused
with one sentence. The file counts into the adapter's content hash. The trainer writes it by `PoolingConfig`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import msgspec

from ..adapter_files import POOLING_FILE
from ..adapter_kinds import AdapterType, PoolingInfo, PoolingType, Question
from ..errors import shortened
from .config_json import decode_object, refuse, shown

FORMAT_VERSION = 1
SCORED: tuple[AdapterType, ...] = ("rerank", "classify")  # have a score matrix
SCORE = "base_model.model.score.weight"  # PEFT's name of it
SEQ_CLS, FEATURE_EXTRACTION = "SEQ_CLS", "FEATURE_EXTRACTION"  # PEFT's task types
MAX_OUTPUTS = 16_384  # rows of a score matrix
MAX_TEXT = 20_000  # characters of a prefix, a suffix, a name or a label
MAX_TOKENS = 1 << 30
# What transformers calls the labels that nobody named.
_LABEL, _QUESTION = "LABEL_{}", "label"
_PAIR_DIVIDER = "\n"  # between query and document, where no file says anything
_ENUM_ERROR = re.compile(r"Invalid enum value .* - at `\$(?:\.questions\[\d+\])?\.(?P<field>\w+)`")


class PoolingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file as it is written; `PoolingInfo` says what the fields mean, and of which types each may be set."""

    adapter_type: AdapterType
    format_version: int = FORMAT_VERSION
    pooling: PoolingType = "last"
    normalize: bool | None = None  # embed; None: true
    dimensions: tuple[int, ...] = ()  # embed
    questions: tuple[Question, ...] = ()  # classify; none: one of multi_class, labels LABEL_0, LABEL_1 ...
    query_prefix: str = ""  # embed, rerank
    document_prefix: str = ""  # embed, rerank
    suffix: str = ""
    append_eos: bool = False
    max_tokens: int | None = None


_MAY_SET: dict[AdapterType, set[str]] = {
    "generate": set(),
    "embed": {"pooling", "normalize", "dimensions", "query_prefix", "document_prefix"},
    "rerank": {"pooling", "query_prefix", "document_prefix"},
    "classify": {"pooling", "questions"},
}
_ALL_MAY_SET = {"adapter_type", "format_version"}
_POOLED_MAY_SET = {"suffix", "append_eos", "max_tokens"}
# What PEFT's model may have been for; of adapters that generate any other, as ever.
_TASK_TYPES: dict[AdapterType, tuple[str | None, ...]] = {
    "embed": (None, "CAUSAL_LM", FEATURE_EXTRACTION),
    "rerank": (None, SEQ_CLS),
    "classify": (None, SEQ_CLS),
}


def read_pooling_config(name: str, paths: Mapping[str, Path]) -> PoolingConfig | None:
    """The checked file of adapter `name`, if there is one among `paths`. Raises `AdapterError`."""
    return parse_pooling_config(name, paths[POOLING_FILE].read_bytes()) if POOLING_FILE in paths else None


def parse_pooling_config(name: str, data: bytes) -> PoolingConfig:
    """Check all of the file that says something by itself. Raises `AdapterError`."""
    raw = decode_object(name, POOLING_FILE, data, "an object with an adapter_type")
    if raw.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        version = shown(raw["format_version"])
        refuse(name, f"{POOLING_FILE} has format_version {version}; {FORMAT_VERSION} is read here")
    try:
        config = msgspec.convert(raw, PoolingConfig)
    except msgspec.ValidationError as error:
        refuse(name, f"{POOLING_FILE}: {_with_choices(str(error))}")
    except UnicodeEncodeError:
        refuse(name, f"{POOLING_FILE}: the name of a field holds half of a surrogate pair")
    for reason in _problems(config):
        refuse(name, f"{POOLING_FILE}: {reason}")
    return config


def _with_choices(message: str) -> str:
    match = _ENUM_ERROR.fullmatch(message)
    message = shortened(message).encode("utf-8", "backslashreplace").decode()  # it may quote half a character
    if match is None:
        return message
    hints: dict[str, Any] = {**get_type_hints(Question), **get_type_hints(PoolingConfig)}
    return f"{message}; one of {', '.join(map(str, get_args(hints[match['field']])))} is expected"


def _problems(config: PoolingConfig) -> Iterator[str]:
    """What is wrong, the first thing first."""
    kind = config.adapter_type
    may_set = _MAY_SET[kind] | _ALL_MAY_SET | (_POOLED_MAY_SET if kind != "generate" else set())
    for field in PoolingConfig.__struct_fields__:
        if field not in may_set and getattr(config, field) != _default_of(field):
            yield f"{field} is {shown(getattr(config, field))}, which says nothing of adapter_type {kind!r}; remove it"
    for field in ("query_prefix", "document_prefix", "suffix"):
        if not _is_text(text := getattr(config, field), 0):
            yield f"{field} is {shown(text)}; at most {MAX_TEXT} whole characters are expected"
    if config.max_tokens is not None and not 1 <= config.max_tokens <= MAX_TOKENS:
        yield f"max_tokens is {shown(config.max_tokens)}; a whole number of 1 to {MAX_TOKENS} or null is expected"
    if any(dim < 1 for dim in config.dimensions) or sorted(set(config.dimensions)) != [*config.dimensions]:
        yield f"dimensions is {shown(config.dimensions)}; different whole numbers above 0, ascending, are expected"
    for name, count in Counter(question.name for question in config.questions).most_common(1):
        if count > 1:
            yield f"questions: {shown(name)} is the name of two of them"
    end = 0
    for question in config.questions:
        yield from (f"question {shown(question.name)}: {reason}" for reason in _question_problems(question, end))
        end += len(question.labels)


def _question_problems(question: Question, first_output: int) -> Iterator[str]:
    labels, thresholds = question.labels, question.thresholds
    if not _is_text(question.name, 1):
        yield f"its name is empty, or more than {MAX_TEXT} whole characters"
    least = 2 if question.kind == "multi_class" else 1
    if len(labels) < least or len(set(labels)) < len(labels) or not all(_is_text(label, 1) for label in labels):
        yield f"labels is {shown(labels)}; {least} or more different texts are expected of {question.kind}"
    if question.first_output != first_output:
        yield (
            f"first_output is {shown(question.first_output)}; outputs are those of one question behind those of the "
            f"other, so {first_output} is expected"
        )
    if not (math.isfinite(question.temperature) and question.temperature > 0):
        yield f"temperature is {shown(question.temperature)}; a finite number above 0 is expected"
    if thresholds and (question.kind != "multi_label" or len(thresholds) != len(labels)):
        yield f"{len(thresholds)} thresholds; one for each of {len(labels)} labels of multi_label are expected, or none"
    if not all(0.0 <= threshold <= 1.0 for threshold in thresholds):
        yield f"thresholds is {shown(thresholds)}; probabilities of 0 to 1 are expected"


def adapter_type_of(
    name: str, task_type: str | None, file: PoolingConfig | None, score_shape: tuple[int, ...] | None
) -> AdapterType:
    """What adapter `name` is, by PEFT's `task_type`, its own file and the shape of its score matrix, if it has any.

    Raises `AdapterError` where these disagree.
    """
    if file is None:
        kind: AdapterType = "embed" if task_type == FEATURE_EXTRACTION else "generate"
        if task_type == SEQ_CLS:
            kind = "rerank" if score_shape is not None and score_shape[:1] == (1,) else "classify"
        said = f"task_type is {shown(task_type)}"
    else:
        kind, said = file.adapter_type, f"{POOLING_FILE} says adapter_type {file.adapter_type!r}"
        if kind == "generate":
            agrees = task_type not in (SEQ_CLS, FEATURE_EXTRACTION)
        else:
            agrees = task_type in _TASK_TYPES[kind]
        if not agrees:
            refuse(name, f"{said}, but task_type in adapter_config.json is {shown(task_type)}; they must agree")
    if kind in SCORED and score_shape is None:
        refuse(name, f"{said}, but there is no score head; train and save it with modules_to_save=['score']")
    if kind not in SCORED and score_shape is not None:
        refuse(
            name,
            f"it has a score head, but {said}; a classifier has task_type 'SEQ_CLS', or a {POOLING_FILE} that says "
            "classify or rerank",
        )
    return kind


def pooling_info(
    name: str, kind: AdapterType, file: PoolingConfig | None, num_outputs: int, hidden_size: int
) -> PoolingInfo | None:
    """What an adapter of this `kind` makes of a text; None of one that generates.

    `num_outputs` are the rows of the score matrix, where it has one. Raises `AdapterError` where the file says other
    sizes than weights and model.
    """
    if kind == "generate":
        return None
    if file is None:
        file = PoolingConfig(adapter_type=kind, document_prefix=_PAIR_DIVIDER if kind == "rerank" else "")
    if kind == "embed":
        num_outputs = hidden_size
        if file.dimensions and file.dimensions[-1] > hidden_size:
            refuse(name, f"{POOLING_FILE}: dimensions go to {file.dimensions[-1]}; the model has {hidden_size}")
    elif kind == "rerank" and num_outputs != 1:
        refuse(name, f"{POOLING_FILE} says rerank, but the score head has {num_outputs} rows; one is expected")
    questions = file.questions
    if kind == "classify":
        if not questions:
            labels = tuple(_LABEL.format(idx) for idx in range(num_outputs))
            questions = (Question(_QUESTION, "multi_class" if num_outputs > 1 else "multi_label", labels, 0),)
        elif (num_labels := sum(len(question.labels) for question in questions)) != num_outputs:
            refuse(
                name,
                f"{POOLING_FILE}: the questions have {num_labels} labels, but the score head has {num_outputs} rows",
            )
    return PoolingInfo(
        pooling=file.pooling,
        num_outputs=num_outputs,
        normalize=file.normalize is not False and kind == "embed",
        dimensions=file.dimensions,
        questions=questions,
        query_prefix=file.query_prefix,
        document_prefix=file.document_prefix,
        suffix=file.suffix,
        append_eos=file.append_eos,
        max_tokens=file.max_tokens,
    )


def _default_of(field: str) -> Any:
    return next(info.default for info in msgspec.structs.fields(PoolingConfig) if info.name == field)


def _is_text(text: str, least: int) -> bool:
    """Whether it has so many characters, and none that is half of one: JSON's escapes can say those."""
    return least <= len(text) <= MAX_TEXT and not any("\ud800" <= char <= "\udfff" for char in text)
