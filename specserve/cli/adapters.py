"""`specserve adapters`: what LoRA directories hold and what is wrong with them.

Without a base model the configuration is checked, and of the tensors only names and shapes: which modules, which ranks.
With one, the engine's own reader decides, so that what passes here is what the server loads.
"""

import re
from pathlib import Path
from typing import Any

import click
import msgspec

from ..adapter_files import (
    CONFIG_FILE,
    HEAD_CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFiles,
    check_complete,
    open_adapter,
)
from ..adapter_messages import LookaheadInfo
from ..errors import AdapterError, UserError

_LORA_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?")


class AdapterSummary(msgspec.Struct):
    """What the headers of an adapter directory say; `problems` is empty when nothing is wrong with them."""

    path: Path
    base_model: str = ""
    peft_type: str = ""
    adapter_type: str = ""
    alpha: float | None = None
    ranks: list[int] = []
    modules: list[str] = []
    num_layers: int = 0
    num_pairs: int = 0
    size_bytes: int = 0
    content_hash: str = ""
    has_lookahead: bool = False
    problems: list[str] = []


def summarise(path: Path) -> AdapterSummary:
    """Read configuration and tensor names of the directory `path`; never raises for what is wrong inside it."""
    summary = AdapterSummary(path)
    try:
        with open_adapter(path, path.name) as files:
            _summarise_files(files, summary)
    except AdapterError as error:
        summary.problems.append(str(error))
    return summary


def _summarise_files(files: AdapterFiles, summary: AdapterSummary) -> None:
    from ..adapters.kind import tensor_shapes
    from ..adapters.peft_config import decode_config, parse_config
    from ..adapters.pooling_config import SCORE, adapter_type_of, read_pooling_config

    name = summary.path.name
    summary.has_lookahead = HEAD_CONFIG_FILE in files.paths
    check_complete(files, summary.path, name)
    data = files.paths[CONFIG_FILE].read_bytes()
    config = decode_config(name, data)
    summary.base_model = _text(config.get("base_model_name_or_path"))
    summary.peft_type = _text(config.get("peft_type"))
    alpha = config.get("lora_alpha")
    summary.alpha = float(alpha) if isinstance(alpha, int | float) and abs(alpha) < 1e300 else None
    pooling = read_pooling_config(name, files.paths)
    peft = parse_config(name, data, pooling)
    shapes = tensor_shapes(name, files.paths[WEIGHTS_FILE])
    score = shapes.get(SCORE)
    summary.adapter_type = adapter_type_of(name, peft.task_type, pooling, tuple(score) if score is not None else None)
    summary.size_bytes = files.paths[WEIGHTS_FILE].stat().st_size
    summary.content_hash = files.content_hash
    _summarise_shapes(shapes, summary)


def _summarise_shapes(shapes: dict[str, list[int]], summary: AdapterSummary) -> None:
    ranks: set[int] = set()
    modules: set[str] = set()
    layers: set[int] = set()
    sides: dict[str, set[str]] = {}
    for name, shape in shapes.items():
        match = _LORA_NAME.fullmatch(name)
        if match is None or len(shape) != 2:
            continue
        module = match["module"]
        sides.setdefault(module, set()).add(match["side"])
        modules.add(module.rsplit(".", 1)[-1])
        ranks.add(shape[0] if match["side"] == "A" else shape[1])
        if layer := re.search(r"\.layers\.(\d+)\.", module):
            layers.add(int(layer[1]))
    summary.ranks, summary.modules, summary.num_layers = sorted(ranks), sorted(modules), len(layers)
    summary.num_pairs = sum(found == {"A", "B"} for found in sides.values())
    halves = sorted(module for module, found in sides.items() if found != {"A", "B"})
    if halves:
        summary.problems.append(f"{halves[0]!r} has only one of lora_A and lora_B")
    if not sides:
        summary.problems.append(f"{WEIGHTS_FILE} holds no LoRA tensors")


def list_directory(directory: Path) -> int:
    """Print a line for every folder in `directory`; 1 if one of them has a problem."""
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}; check the path")
    folders = sorted(entry for entry in directory.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        click.echo(f"no adapters in {directory}: every folder in it would be one", err=True)
        return 0
    summaries = [summarise(folder) for folder in folders]
    width = max(len("name"), *(len(folder.name) for folder in folders))
    click.echo(f"{'name':<{width}}  {'rank':>7}  {'size':>9}  {'hash':<12}  modules")
    for summary in summaries:
        name = f"{summary.path.name:<{width}}"
        if summary.problems:
            click.echo(f"{name}  problem: {summary.problems[0]}")
            continue
        modules = ",".join(summary.modules) + ("  +lookahead head" if summary.has_lookahead else "")
        click.echo(
            f"{name}  {_ranks(summary):>7}  {_mib(summary.size_bytes):>9}  {summary.content_hash[:12]}  {modules}"
        )
    return int(any(summary.problems for summary in summaries))


def inspect_directory(directory: Path, model: str | None, dtype: str, max_lora_rank: int) -> int:
    """Print all that is known of one adapter; with `model`, served as `dtype`, check it as the engine would.

    1 on problems.
    """
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}; check the path")
    summary = summarise(directory)
    problems = list(summary.problems)
    lookahead = "yes" if summary.has_lookahead else "no"
    if model is not None and not problems:
        from ..adapters.lora import read_adapter
        from ..adapters.served_base import ServedBase
        from ..compute.device_choice import choose_device
        from ..config import EngineConfig
        from ..model.store import resolve_model

        base = ServedBase.of_files(resolve_model(model), choose_device(EngineConfig()), dtype)
        try:
            adapter = read_adapter(directory, base, name=directory.name, max_rank=max_lora_rank)
            lookahead = _lookahead_line(adapter.info().lookahead)
            if adapter.lookahead is not None and adapter.lookahead.error:
                problems.append(adapter.lookahead.error)
        except AdapterError as error:
            problems.append(str(error))
    rows = {
        "type": summary.peft_type or "?",
        "adapter type": summary.adapter_type or "?",
        "base model": summary.base_model or "?",
        "rank": _ranks(summary),
        "alpha": "?" if summary.alpha is None else f"{summary.alpha:g}",
        "modules": ", ".join(summary.modules) or "none",
        "layers": str(summary.num_layers),
        "pairs": f"{summary.num_pairs} (A, B)",
        "size": _mib(summary.size_bytes),
        "content hash": summary.content_hash or "?",
        "lookahead": lookahead,
        "checked": "names and files only; --model checks shapes and values" if model is None else "as the server does",
    }
    for key, value in rows.items():
        click.echo(f"{key:<13} {value}")
    for problem in problems:
        click.echo(f"problem       {problem}")
    return int(bool(problems))


def _lookahead_line(info: LookaheadInfo | None) -> str:
    if info is None:
        return "no"
    head = f"a head that drafts {info.draft_len} tokens" if info.draft_len else "no usable head"
    return f"{head}, a history of {info.history_tokens} tokens"


def _text(value: Any) -> str:
    from ..adapters.config_json import shown

    return value if isinstance(value, str) and value.isprintable() else "" if value is None else shown(value)


def _ranks(summary: AdapterSummary) -> str:
    if not summary.ranks:
        return "?"
    low, high = summary.ranks[0], summary.ranks[-1]
    return str(low) if low == high else f"{low}-{high}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
