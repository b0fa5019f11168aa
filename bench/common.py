"""What the benches share: the machine in words, the floor that reading weights sets, and the record of a run.

Owns no measurement. A bench prints its machine and its limit first and ends in one JSON line, with commit, versions and
hardware; the line is kept in bench/results, too, where it is to be saved. It never names a directory of the machine
that made it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")


def cache_dir() -> Path:
    """Where adapters and virtual environments of the benches are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "specserve" / "bench"


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


@dataclass(frozen=True, slots=True)
class WeightFloor:
    """No decoding step takes less time than reading the weights once."""

    num_params: int
    bytes_per_s: float

    @classmethod
    def measured(cls, model_dir: Path) -> WeightFloor:
        return cls(num_parameters(model_dir), memory_bandwidth())

    def num_bytes(self, bits: float = 16) -> float:
        return self.num_params * bits / 8

    def ms(self, bits: float = 16) -> float:
        return 1e3 * self.num_bytes(bits) / self.bytes_per_s


def print_floor(model_dir: Path) -> WeightFloor:
    floor = WeightFloor.measured(model_dir)
    click.echo(f"floor: a step that only reads the weights at 16 bits takes {floor.ms():.1f} ms")
    return floor


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a bench, begun by `start`."""

    name: str
    versions: dict[str, str]
    hardware: dict[str, Any] | str

    def finish(self, fields: Mapping[str, Any], save: bool) -> None:
        """The run's JSON line; `fields` may say versions better."""
        setup = {"commit": commit(), "versions": self.versions, "hardware": self.hardware}
        report(self.name, {**setup, **fields}, save)


def start(name: str, *packages: str, device: str = "cpu") -> Run:
    """Print the machine, a GPU by its name; `packages` are those whose versions the result tells."""
    if torch.device(device).type == "cuda":
        machine: dict[str, Any] | str = torch.cuda.get_device_name(torch.device(device))
        click.echo(f"{machine}; torch {torch.__version__}")
    else:
        machine = hardware()
        click.echo(hardware_line(machine))
    return Run(name, versions(*packages), machine)


def report(name: str, fields: Mapping[str, Any], save: bool) -> None:
    """Print `fields` as the JSON line of bench `name`, and append it to bench/results/`name`.jsonl if `save`."""
    line = json.dumps({"bench": name, "date": datetime.now(UTC).strftime("%Y-%m-%d"), **fields})
    if save:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    click.echo(line)
