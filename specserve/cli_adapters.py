"""`specserve adapters`: what LoRA directories hold and what is wrong with them.

Without a base model only headers are read: which modules, which ranks, whether the files fit each other. With one, the
engine's own reader decides, so that what passes here is what the server loads.
"""

import json
import re
from pathlib import Path
from typing import Any

import click
import msgspec

from .errors import AdapterError, UserError
from .messages import LookaheadInfo

_LORA_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?")


class AdapterSummary(msgspec.Struct):
    """What the headers of an adapter directory say; `problems` is empty when nothing is wrong with them."""

    path: Path
    base_model: str = ""
    peft_type: str = ""
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
    summary = AdapterSummary(path, has_lookahead=(path / "lookahead_config.json").is_file())
    config = _config(path, summary)
    summary.base_model = str(config.get("base_model_name_or_path") or "")
    summary.peft_type = str(config.get("peft_type") or "")
    alpha = config.get("lora_alpha")
    summary.alpha = alpha if isinstance(alpha, int | float) else None
    shapes = _shapes(path, summary)
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
        summary.problems.append(f"{halves[0]} has only one of lora_A and lora_B")
    if shapes and not sides:
        summary.problems.append("adapter_model.safetensors holds no LoRA tensors")
    if not summary.problems:
        from .adapter_files import content_hash

        summary.content_hash = content_hash(path)
    return summary


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


def inspect_directory(directory: Path, model: str | None, max_lora_rank: int) -> int:
    """Print all that is known of one adapter; with `model`, check it as the engine would. 1 on problems."""
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}; check the path")
    summary = summarise(directory)
    problems = list(summary.problems)
    lookahead = "yes" if summary.has_lookahead else "no"
    if model is not None and not problems:
        from .lookahead import BaseIdentity
        from .lora import read_adapter
        from .model.config import ModelConfig
        from .model_store import resolve_model

        model_dir = resolve_model(model)
        config, base = ModelConfig.from_dir(model_dir), BaseIdentity.of(model_dir)
        try:
            adapter = read_adapter(directory, config, name=directory.name, max_rank=max_lora_rank, base=base)
            lookahead = _lookahead_line(adapter.info().lookahead)
            if adapter.lookahead is not None and adapter.lookahead.error:
                problems.append(adapter.lookahead.error)
        except AdapterError as error:
            problems.append(str(error))
    rows = {
        "type": summary.peft_type or "?",
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


def _config(path: Path, summary: AdapterSummary) -> dict[str, Any]:
    file = path / "adapter_config.json"
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        summary.problems.append(f"adapter_config.json: {error.strerror}; a PEFT LoRA directory is expected")
        return {}
    except (ValueError, RecursionError) as error:
        summary.problems.append(f"adapter_config.json is not valid JSON: {error}")
        return {}
    if not isinstance(config, dict):
        summary.problems.append("adapter_config.json is not a JSON object")
        return {}
    if config.get("peft_type") != "LORA":
        summary.problems.append(f"peft_type is {config.get('peft_type')!r}; only 'LORA' is served")
    return config


def _shapes(path: Path, summary: AdapterSummary) -> dict[str, list[int]]:
    import safetensors

    file = path / "adapter_model.safetensors"
    if not file.is_file():
        hint = "; .bin files are pickles and never loaded" if any(path.glob("adapter_model.bin")) else ""
        summary.problems.append(f"there is no adapter_model.safetensors{hint}")
        return {}
    summary.size_bytes = file.stat().st_size
    try:
        with safetensors.safe_open(file, framework="np") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        summary.problems.append(f"adapter_model.safetensors is not readable: {error}")
        return {}


def _ranks(summary: AdapterSummary) -> str:
    if not summary.ranks:
        return "?"
    low, high = summary.ranks[0], summary.ranks[-1]
    return str(low) if low == high else f"{low}-{high}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"
