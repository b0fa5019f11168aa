"""A run's configuration from a YAML file, `--set` overrides and flags, in that order; later ones win.

Owns the reading and the wording of what is wrong: unknown keys are refused with the nearest known one, wrong values
with the dotted key, the value and the limit. Paths in a file are relative to the file's folder. What only the base
model or the data can tell is looked at in preflight.py.
"""

from __future__ import annotations

import datetime
import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from ..adapter_files import CONFIG_FILE
from ..errors import UserError
from ..given_files import check_given
from ..strict_yaml import read_yaml, strict_loader
from .adapter_settings import adapter_settings, check_not_others
from .run_config import ALL_LINEAR, TARGETS, RunConfig

RUN_FILE = "run.yaml"  # in the output directory: what the run was
_PATHS = ("data.train", "data.eval", "lora.adapter", "output", "teacher")
# What other trainers call it.
_WORDS_OF_OTHERS = {
    "learning_rate": "optimizer.lr",
    "batch_size": "optimizer.batch_tokens",
    "per_device_train_batch_size": "optimizer.batch_tokens",
    "num_epochs": "optimizer.epochs",
    "num_train_epochs": "optimizer.epochs",
    "save_steps": "checkpoint.every_steps",
    "max_length": "data.max_len",
    "max_seq_length": "data.max_len",
    "sequence_len": "data.max_len",
    "rank": "lora.r",
    "lora_r": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
}


def load_run(path: Path | None, overrides: Sequence[str], flags: Mapping[str, Any]) -> RunConfig:
    """Build the configuration; `overrides` are "lora.r=32", `flags` dotted keys whose None values were not given.

    Of a LoRA that the run goes on from, rank, alpha and modules are its own.
    Raises `UserError` naming the key, the value and the limit.
    """
    values: dict[str, Any] = {}
    given: dict[str, Any] = {}
    if path is not None:
        check_given(path, "run")
        for key, value in flatten(read_yaml(path, "the run file")):
            is_path = key in _PATHS and isinstance(value, str) and value
            values[key] = str((path.parent / Path(value).expanduser()).resolve()) if is_path else value
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--set {override!r} is not KEY=VALUE, as in --set lora.r=32", param="set")
        try:
            given[key.strip()] = yaml.load(text, Loader=strict_loader())  # derived from SafeLoader
        except yaml.YAMLError as error:
            raise UserError(f"--set {override!r}: the value is not YAML: {error}", param=key) from None
    given |= {key: value for key, value in flags.items() if value is not None}
    values |= given
    adapter = values.get("lora.adapter")
    known = adapter_settings(adapter) if isinstance(adapter, str) else {}
    check_not_others(given, known)
    config = _convert({key: value for key, value in values.items() if key not in known})
    lora = {key.removeprefix("lora."): value for key, value in known.items()}  # beyond a new one's limits, maybe
    return msgspec.structs.replace(config, lora=msgspec.structs.replace(config.lora, **lora)) if lora else config


def check_ready(config: RunConfig, *, writes: bool = True) -> None:
    """What a run cannot start without, or one that `writes` nothing. Raises `UserError`."""
    if not config.data.train:
        raise UserError("data.train is missing: name the JSONL of training rows (--data FILE)", param="data.train")
    if writes and not config.output:
        raise UserError("output is missing: name the directory of the result (--output DIR)", param="output")
    for key, file in (("data.train", config.data.train), ("data.eval", config.data.eval)):
        if file and not Path(file).is_file():
            raise UserError(f"{key}: there is no file {file}", param=key)
    _check_parts(config)
    if config.loss != "ce" and (config.task != "generate" or not config.lora.is_trained):
        what = f"task is {config.task}" if config.lora.is_trained else "--head-only trains no LoRA"
        raise UserError(
            f"loss is {config.loss}, which is of a LoRA that answers, but {what}; leave loss out", param="loss"
        )
    if config.teacher and config.loss == "ce":
        raise UserError(
            f"teacher is {config.teacher}, but loss ce reads no teacher: give loss kl or mixed (--set loss=mixed)",
            param="loss",
        )
    if config.lora.adapter and not (Path(config.lora.adapter) / CONFIG_FILE).is_file():
        raise UserError(f"lora.adapter: {config.lora.adapter} is not a PEFT directory", param="lora.adapter")


def _check_parts(config: RunConfig) -> None:
    """LoRA and head: that something is left to train."""
    lora = config.lora
    if config.task != "generate" and lora.enabled:
        return
    if not lora.enabled and lora.adapter:
        raise UserError("--base trains a head of the bare base model: leave --adapter out", param="lora.adapter")
    if not lora.enabled and config.task != "generate":
        raise UserError(f"--base trains a head that drafts answers, but task is {config.task}", param="task")
    if lora.enabled and lora.frozen and not lora.adapter:
        raise UserError(
            "--head-only needs --adapter DIR, the LoRA that gets a head, or --base, for one of the bare base model",
            param="lora.adapter",
        )
    if not lora.is_trained and not config.head.enabled:
        raise UserError("--head-only with head.enabled=false trains nothing; leave one of them out", param="head")


def save_resolved(config: RunConfig, path: Path) -> None:
    """Write every setting as YAML, paths absolute; `load_run` reads it back equal."""
    path.write_text(yaml.safe_dump(absolute(config), sort_keys=False), encoding="utf-8")


def absolute(config: RunConfig) -> dict[str, Any]:
    """Every setting, nested, with absolute paths."""
    values = msgspec.to_builtins(config)
    for key in _PATHS:
        section, _, field = key.rpartition(".")
        holder = values[section] if section else values
        if holder[field]:
            holder[field] = str(Path(holder[field]).resolve())
    return values


def began_on(directory: Path) -> datetime.date | None:
    """The day of the run whose result is in `directory`: its rows have it wherever the chat template writes a date.

    None where nothing says so, as beside another tool's adapter.
    """
    try:
        return load_run(directory / RUN_FILE, [], {}).data.date if (directory / RUN_FILE).is_file() else None
    except UserError:
        return None


def known_keys() -> list[str]:
    """Every dotted key."""
    return [key for key, _ in flatten(msgspec.to_builtins(RunConfig()))]


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested settings."""
    for key, value in content.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from flatten(value, f"{dotted}.")
        else:
            yield dotted, value


def _convert(values: Mapping[str, Any]) -> RunConfig:
    known = known_keys()
    nested: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            close = " or ".join(map(repr, _meant(key, known)))
            hint = f"; did you mean {close}?" if close else f"; known are {', '.join(known)}"
            raise UserError(f"unknown key {key!r} in the run's configuration{hint}", param=key)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} is {value}: a finite number is expected", param=key)
        if key == "lora.target_modules":
            value = _target_modules(value)
        section, _, field = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[field] = value
    try:
        return msgspec.convert(nested, RunConfig)
    except msgspec.ValidationError as error:
        found = re.search(r"at `\$\.([\w.]+)", str(error))
        key = found[1] if found else ""
        reason = str(error).partition(" - at")[0]
        raise UserError(f"{key} is {values.get(key)!r}: {reason}", param=key) from None


def _meant(key: str, known: Sequence[str]) -> list[str]:
    """The keys that an unknown one may stand for: of its last word, of what others call so, or spelled alike."""
    field = key.rpartition(".")[2]
    if field in _WORDS_OF_OTHERS:
        return [_WORDS_OF_OTHERS[field]]
    fields = {name.rpartition(".")[2] for name in known}
    alike = difflib.get_close_matches(field, fields, n=1)
    return difflib.get_close_matches(key, [name for name in known if name.rpartition(".")[2] in alike], cutoff=0.0)


def _target_modules(value: Any) -> Any:
    """'all-linear', or a list of modules, also where one stands alone. Raises `UserError`; leaves wrong types."""
    key = "lora.target_modules"
    if value == ALL_LINEAR or not isinstance(value, str | list | tuple):
        return value
    names = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    known = ", ".join(TARGETS)
    if not names:
        raise UserError(f"{key} is empty, so that nothing would be trained; give {ALL_LINEAR!r} or some of {known}")
    for name in names:
        if name not in TARGETS:
            close = difflib.get_close_matches(str(name), TARGETS, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"{key} holds {name!r}, which is no module that a LoRA can be served on{hint}; give {ALL_LINEAR!r} or "
                f"a list of {known} (regular expressions and names of single layers are not supported)",
                param=key,
            )
    return list(dict.fromkeys(names))
