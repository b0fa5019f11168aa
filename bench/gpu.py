"""Does all that needs a GPU work, and how fast? The tests marked gpu, then every GPU bench, within a time budget.

Each part is a process of its own, so that one that crashes takes nothing with it; its output goes to OUT/<part>.log and
the JSON lines of all parts to OUT/gpu.jsonl. Parts run in order of what they tell most; one that no longer fits the
budget is skipped and said to be. The exit status is 1 if any part failed or was skipped.

    python -m bench.gpu [--out gpu-results] [--budget 530] [--only tests,steps]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

from . import common

LEAST_S = 20  # a part is not begun with less


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    arguments: tuple[str, ...]  # of python -m
    limit_s: int


def gpu_tests() -> tuple[str, ...]:
    """The files that hold tests for a GPU: the others may need packages that a GPU machine has no use for."""
    files = sorted((common.ROOT / "tests").rglob("test_*.py"))
    return tuple(
        str(file.relative_to(common.ROOT)) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")
    )


PARTS = (
    Part("tests", ("pytest", "-m", "gpu", "-q"), 150),  # and `gpu_tests`
    Part("steps", ("bench.gpu_steps", "--shape", "llama8b"), 90),
    Part("exact", ("bench.gpu_exact",), 60),
    Part("serving", ("bench.gpu_serving",), 180),
    Part("lora", ("bench.lora_kernels",), 60),
    Part("linears", ("bench.linear_rows",), 35),
    Part("quantized", ("bench.scaled_weights",), 50),
    Part("attention", ("bench.attention_kernels",), 60),
    Part("sampling", ("bench.sampling_kernels",), 30),
    Part("heads", ("bench.head_loop",), 30),
    Part("steps-small", ("bench.gpu_steps", "--shape", "smollm2"), 45),
)


def run_part(part: Part, out: Path, limit_s: float) -> tuple[str, float, list[str]]:
    """("ok", "failed" or "timeout", seconds, JSON lines) of one part."""
    tests = gpu_tests() if part.name == "tests" else ()
    command = [sys.executable, "-m", *part.arguments, *tests]
    start = time.monotonic()
    with (out / f"{part.name}.log").open("w", encoding="utf-8") as log:
        try:
            code = subprocess.run(
                command, cwd=common.ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=limit_s, check=False,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
    state = "timeout" if code is None else "failed" if code else "ok"
    text = (out / f"{part.name}.log").read_text(encoding="utf-8", errors="replace")
    return state, time.monotonic() - start, [line for line in text.splitlines() if line.startswith('{"bench"')]


@click.command(help=__doc__.partition("\n")[0])
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("gpu-results"), show_default=True)
@click.option("--budget", "budget_s", type=click.IntRange(1), default=530, show_default=True, help="Seconds in all.")
@click.option("--only", default="", help="Parts by name, separated by commas; default: all.")
def main(out: Path, budget_s: int, only: str) -> None:
    names = [name for name in only.split(",") if name]
    unknown = sorted(set(names) - {part.name for part in PARTS})
    if unknown:
        raise click.UsageError(f"--only: {', '.join(unknown)} is none of {', '.join(p.name for p in PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget_s
    states, records = {}, []
    for part in PARTS:
        if names and part.name not in names:
            continue
        left = end - time.monotonic()
        if left < LEAST_S:
            states[part.name] = "skipped"
            click.echo(f"{part.name}: skipped, {left:.0f} s are left")
            continue
        state, seconds, lines = run_part(part, out, min(part.limit_s, left))
        states[part.name] = state
        records += lines
        click.echo(f"{part.name}: {state} in {seconds:.0f} s")
        tail = (out / f"{part.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        for line in tail[-40 if state != "ok" else -12 :]:
            click.echo(f"    {line[:300]}")
    (out / "gpu.jsonl").write_text("".join(f"{line}\n" for line in records), encoding="utf-8")
    common.report("gpu", {"parts": states}, save=False)
    sys.exit(0 if all(state == "ok" for state in states.values()) else 1)


if __name__ == "__main__":
    main()
