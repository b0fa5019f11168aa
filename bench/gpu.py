"""Does all that needs a GPU work, and how fast? The tests marked gpu, then every GPU bench, within a time budget.

Each part is a process of its own, so that one that crashes takes nothing with it, and one that takes too long ends with
all that it started; its output goes to OUT/<part>.log and, as parts end, their JSON lines to OUT/gpu.jsonl. Parts run
in order of what they tell most; one that no longer fits the budget is skipped and said to be. The exit status is 1 if
any part failed or was skipped. --dry-run does the same with tiny sizes on a CPU, partly under Triton's interpreter, and
collects the tests without running them: what would fail on a card for another reason than the card shows there.

    python -m bench.gpu [--out gpu-results] [--budget 570] [--only tests,steps] [--dry-run]
"""

from __future__ import annotations

import contextlib
import os
import signal
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
    dry: tuple[str, ...] = ("--dry-run",)  # in place of the arguments behind the module's name


DRY_S = 300  # limit of a part in a dry run


def gpu_tests() -> tuple[str, ...]:
    """The files that hold tests for a GPU: the others may need packages that a GPU machine has no use for."""
    files = sorted((common.ROOT / "tests").rglob("test_*.py"))
    return tuple(
        str(file.relative_to(common.ROOT)) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")
    )


# Some 500 kernels are compiled for the tests, of which a process takes about one a second.
TOGETHER = ("-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal")
ROWS = "examples/data/control2json.train.jsonl"
TINY_STEPS = ("--shape", "tiny", "--device", "cpu", "--rounds", "1", "--context", "20", "--seqs", "2")
TINY_STEPS_IN_8_BITS = (*TINY_STEPS, "--quantization", "int8")
PARTS = (
    Part("tests", ("pytest", *TOGETHER, "-m", "gpu", "-q"), 150, ("-m", "gpu", "-q", "--collect-only")),  # `gpu_tests`
    Part(
        "server", ("bench.gpu_server",), 100,
        ("--device", "cpu", "--num", "3", "--late", "1", "--concurrency", "2", "--duration", "1", "--max-tokens", "8"),
    ),
    Part("steps-small", ("bench.gpu_steps", "--shape", "smollm2"), 30, (*TINY_STEPS, "--exact", "on")),
    Part("quantized", ("bench.scaled_weights", "--budget", "30"), 45),
    Part("steps-int8", ("bench.gpu_steps", "--shape", "llama8b", "--quantization", "int8"), 45, TINY_STEPS_IN_8_BITS),
    Part(
        "train", ("bench.gpu_train",), 75,
        ("--device", "cpu", "--max-steps", "2", "--rows", "2", "--batch-tokens", "512", "--max-tokens", "8"),
    ),
    Part(
        "train-speed",
        ("bench.train_speed", "--data", ROWS, "--device", "cuda", "--batch-tokens", "8192", "--steps", "8")
        + ("--no-save",),
        45, ("--data", ROWS, "--rounds", "1", "--steps", "1", "--batch-tokens", "512", "--no-save"),
    ),
    Part("exact", ("bench.gpu_exact",), 50, ("--num", "2", "--max-tokens", "4", "--device", "cpu")),
    Part(
        "serving", ("bench.gpu_serving", "--loads", "1,8,32,256", "--rounds", "2"), 120,
        ("--loads", "2", "--rounds", "1", "--max-tokens", "4", "--max-requests", "2", "--peft-batch", "2")
        + ("--device", "cpu"),
    ),
    Part("sampling", ("bench.sampling_kernels", "--budget", "15"), 25),
    Part("steps", ("bench.gpu_steps", "--shape", "llama8b"), 60, TINY_STEPS),
    Part("attention", ("bench.attention_kernels", "--before", "--budget", "25"), 50),
    Part("linears", ("bench.linear_rows", "--budget", "15"), 25),
    Part("lora", ("bench.lora_kernels", "--budget", "20"), 35),
    Part("heads", ("bench.head_loop", "--budget", "10"), 20),
)  # fmt: skip


def run_part(part: Part, out: Path, limit_s: float, is_dry: bool = False) -> tuple[str, float, list[str]]:
    """("ok", "failed" or "timeout", seconds, JSON lines) of one part."""
    tests = gpu_tests() if part.name == "tests" else ()
    arguments = (part.arguments[0], *part.dry) if is_dry else part.arguments
    command = [sys.executable, "-m", *arguments, *tests]
    env = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"TRITON_INTERPRET": "1"} if is_dry else {})
    start = time.monotonic()
    with (out / f"{part.name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=common.ROOT, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):  # a server that it started would keep the card's memory
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = None
    state = "timeout" if code is None else "failed" if code else "ok"
    text = (out / f"{part.name}.log").read_text(encoding="utf-8", errors="replace")
    return state, time.monotonic() - start, [line for line in text.splitlines() if line.startswith('{"bench"')]


@click.command(help=__doc__.partition("\n")[0])
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=Path("gpu-results"), show_default=True)
@click.option("--budget", "budget_s", type=click.IntRange(1), default=570, show_default=True, help="Seconds in all.")
@click.option("--only", default="", help="Parts by name, separated by commas; default: all.")
@click.option("--dry-run", "is_dry", is_flag=True, help="Tiny sizes on a CPU, without a limit in all.")
def main(out: Path, budget_s: int, only: str, is_dry: bool) -> None:
    names = [name for name in only.split(",") if name]
    unknown = sorted(set(names) - {part.name for part in PARTS})
    if unknown:
        raise click.UsageError(f"--only: {', '.join(unknown)} is none of {', '.join(p.name for p in PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + (len(PARTS) * DRY_S if is_dry else budget_s)
    states, results = {}, out / "gpu.jsonl"
    results.write_text("", encoding="utf-8")
    for part in PARTS:
        if names and part.name not in names:
            continue
        left = end - time.monotonic()
        if left < LEAST_S:
            states[part.name] = "skipped"
            click.echo(f"{part.name}: skipped, {left:.0f} s are left")
            continue
        state, seconds, lines = run_part(part, out, min(DRY_S if is_dry else part.limit_s, left), is_dry)
        states[part.name] = state
        with results.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        click.echo(f"{part.name}: {state} in {seconds:.0f} s")
        tail = (out / f"{part.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
        for line in tail[-40 if state != "ok" else -12 :]:
            click.echo(f"    {line[:300]}")
    common.report("gpu", {"parts": states, "dry_run": is_dry}, save=False)
    sys.exit(0 if all(state == "ok" for state in states.values()) else 1)


if __name__ == "__main__":
    main()
