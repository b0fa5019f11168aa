"""Processes of their own for Triton: TRITON_INTERPRET counts only if it is set before triton is imported first."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_cases(name: str, *, interpret: str = "1", timeout_s: float = 300) -> None:
    """Run the tests of the file `name` here, with TRITON_INTERPRET as said."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / name)]
    env = os.environ | {"TRITON_INTERPRET": interpret}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def compile_for_hopper(name: str, cache_dir: Path, *, timeout_s: float = 300) -> None:
    """Run the script `name` here, which compiles, without the interpreter and with an empty cache."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache_dir), "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, str(TESTS / name)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-6000:]


def import_without_triton(modules: str) -> None:
    """Import `modules`, separated by commas, where triton cannot be imported."""
    code = f"import sys; sys.modules['triton'] = None; import {modules}"
    env = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)
