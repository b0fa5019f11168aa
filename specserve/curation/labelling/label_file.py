"""What `specserve label` is to do, from a YAML file: texts, questions, and the functions that have opinions on them.

Owns the format and the wording of what is wrong with it: keys by their dotted name, with the value and the fix.
Paths in the file are relative to its folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ...errors import UserError
from ...given_files import check_given
from ...strict_yaml import read_yaml

LabelModel = Literal["dawid_skene", "mace", "majority"]
SOURCES = ("pattern", "python", "prompt", "classifier")
Name = Annotated[str, Meta(min_length=1, max_length=64)]
Label = Annotated[str, Meta(min_length=1)]


class FunctionSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A labelling function: one of pattern, python, prompt and classifier says which kind."""

    name: Name
    pattern: str | None = None  # a regular expression that is searched for in the text; then the text has `label`
    label: Label | None = None
    otherwise: Literal["abstain", "absent"] | None = None  # where it is not found; absent only with `several`
    python: str | None = None  # FILE.py:FUNCTION, called with the text
    prompt: str | None = None  # asked of the teacher; {text} and {labels} are filled in
    classifier: str | None = None  # directory of an adapter that classifies
    question: str | None = None  # of that adapter; default: the one of the same name
    threshold: Annotated[float, Meta(ge=0, lt=1)] = 0.5  # less likely answers of the classifier abstain

    @property
    def source(self) -> str:
        """Which of `SOURCES` it is."""
        return next(source for source in SOURCES if getattr(self, source) is not None)


class QuestionSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    labels: Annotated[tuple[Label, ...], Meta(min_length=1)]
    functions: Annotated[tuple[FunctionSpec, ...], Meta(min_length=1)]
    several: bool = False  # any number of labels may hold, none included


class LabelFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    data: str  # JSONL
    output: str  # JSONL of rows that classify learns from, or with `prompt` of rows that answer it
    questions: Annotated[dict[Name, QuestionSpec], Meta(min_length=1)]
    text_field: str = "text"
    prompt: str | None = None  # {text} is filled in; the answers are what a model learns to write
    gold: str | None = None  # rows of classify whose answers are known; used to judge, never to label or to train
    held_out: str | tuple[str, ...] = ()  # JSONL of rows that something is measured on; texts like them become no rows
    label_model: LabelModel = "dawid_skene"
    soft: bool = True  # probabilities; false: the likeliest answer
    min_confidence: Annotated[float, Meta(ge=0, le=1)] = 0.0  # less certain answers are left open

    @property
    def held_out_files(self) -> tuple[str, ...]:
        return (self.held_out,) if isinstance(self.held_out, str) else self.held_out

    def functions(self) -> Iterator[tuple[str, QuestionSpec, FunctionSpec]]:
        """(question, what it may be, function), in the order of the file."""
        for name, question in self.questions.items():
            for function in question.functions:
                yield name, question, function


def read_label_file(path: Path) -> LabelFile:
    """Raises `UserError` that names the key."""
    check_given(path, "label")
    content = read_yaml(path, "the label file")
    try:
        spec = msgspec.convert(content, LabelFile)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        key = place.rstrip("`").lstrip(".").replace("[...]", "") or "the file"
        raise UserError(f"{path}: {key}: {reason}", param=key) from None
    if spec.prompt is not None and "{text}" not in spec.prompt:
        raise UserError(f"{path}: prompt: it holds no {{text}}, so that every row would be the same", param="prompt")
    for name, question in spec.questions.items():
        _check_question(str(path), f"questions.{name}", name, question)
    changes: dict[str, Any] = {"data": _beside(path, spec.data), "output": _beside(path, spec.output)}
    if spec.gold is not None:
        changes["gold"] = _beside(path, spec.gold)
    changes["held_out"] = tuple(_beside(path, name) for name in spec.held_out_files)
    changes["questions"] = {
        name: msgspec.structs.replace(question, functions=tuple(_placed(path, f) for f in question.functions))
        for name, question in spec.questions.items()
    }
    for read in ("data", "gold", "held_out"):
        if changes["output"] == changes.get(read) or read == "held_out" and changes["output"] in changes[read]:
            raise UserError(
                f"{path}: output: {spec.output} is {read}, too, and would be written over; name another file",
                param="output",
            )
    return msgspec.structs.replace(spec, **changes)


def _check_question(file: str, at: str, name: str, question: QuestionSpec) -> None:
    def wrong(key: str, what: str) -> UserError:
        return UserError(f"{file}: {key}: {what}", param=key)

    if len(set(question.labels)) < len(question.labels):
        raise wrong(f"{at}.labels", "a label stands there twice; keep one")
    if not question.several and len(question.labels) < 2:
        raise wrong(f"{at}.labels", "one label is no choice; name two or more, or set several: true")
    seen: set[str] = set()
    for function in question.functions:
        where = f"{at}.functions[{function.name!r}]"
        if function.name in seen:
            raise wrong(where, "two functions of this question have this name; rename one")
        seen.add(function.name)
        given = [source for source in SOURCES if getattr(function, source) is not None]
        if len(given) != 1:
            raise wrong(where, f"it has {' and '.join(given) or 'none'} of {', '.join(SOURCES)}; give one of them")
        if (function.pattern is not None) != (function.label is not None):
            raise wrong(where, "pattern and label belong together: what a text that holds the pattern is")
        if function.label is not None and function.label not in question.labels:
            raise wrong(f"{where}.label", f"{function.label!r} is none of the labels {', '.join(question.labels)}")
        if function.otherwise is not None and function.pattern is None:
            raise wrong(f"{where}.otherwise", "only a pattern has it")
        if function.otherwise == "absent" and not question.several:
            raise wrong(f"{where}.otherwise", f"absent is an answer only where {name!r} has several: true")
        if function.question is not None and function.classifier is None:
            raise wrong(f"{where}.question", "only a classifier has it")
        if function.pattern is not None:
            try:
                re.compile(function.pattern)
            except re.error as error:
                raise wrong(f"{where}.pattern", f"{function.pattern!r} is no regular expression: {error}") from None
        if function.prompt is not None and "{text}" not in function.prompt:
            raise wrong(f"{where}.prompt", "it holds no {text}, so that every text would get the same answer")
        if function.python is not None and not re.fullmatch(r".+\.py:\w+", function.python):
            raise wrong(f"{where}.python", f"{function.python!r} is not FILE.py:FUNCTION")


def _beside(path: Path, name: str) -> str:
    return str((path.parent / Path(name).expanduser()).resolve())


def _placed(path: Path, function: FunctionSpec) -> FunctionSpec:
    if function.python is not None:
        file, _, called = function.python.rpartition(":")
        return msgspec.structs.replace(function, python=f"{_beside(path, file)}:{called}")
    if function.classifier is not None:
        return msgspec.structs.replace(function, classifier=_beside(path, function.classifier))
    return function
