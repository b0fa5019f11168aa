"""What the benches share: prompts, the machine in words, the memory limit, and the file that results are kept in.

Owns no measurement. Results are appended as one JSON line a run, with commit, versions and hardware, and never name a
directory of the machine that made them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "bench" / "data" / "prompts.jsonl"
RESULTS = ROOT / "bench" / "results"
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


def cache_dir() -> Path:
    """Where adapters and virtual environments of the benches are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "specserve" / "bench"


def read_prompts(task: str | None = None) -> list[dict[str, str]]:
    """Rows with task, prompt and completion; the tasks take turns."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if task in (None, row["task"])]


def chat_token_ids(tokenizer: Any, text: str) -> list[int]:
    """`text` as the user's turn of the model's chat template, with the assistant's turn opened."""
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


def hardware() -> dict[str, Any]:
    """CPU model, usable cores and the instruction sets that decide which dtype is fast."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    present = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": num_cores(),
        "flags": [flag for flag in CPU_FLAGS if flag in present],
        "load_average": round(os.getloadavg()[0], 2),  # above 0 at the start: something else is running
    }


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware_line(machine: dict[str, Any]) -> str:
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['flags']) or 'no avx2'}; "
        f"torch {torch.__version__}; load average at start {machine['load_average']}"
    )


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def commit() -> str:
    """Short commit, with -dirty where tracked files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def memory_bandwidth(repeats: int = 7) -> float:
    """Bytes a second that summing 256 MiB reads with all threads; the fastest repeat counts."""
    data = torch.ones(1 << 26)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def num_parameters(model_dir: Path) -> int:
    """Parameters that a step reads: all stored ones (a tied output layer is stored once and read once)."""
    from safetensors import safe_open

    total = 0
    for file in model_dir.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                count = 1
                for size in tensors.get_slice(name).get_shape():
                    count *= size
                total += count
    return total


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def append_result(name: str, result: dict[str, Any]) -> None:
    """Print `result` as one JSON line and append it to bench/results/`name`.jsonl."""
    line = json.dumps({"bench": name, "date": datetime.now(UTC).strftime("%Y-%m-%d"), **result})
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line)
