"""The engine on the Triton path: through the interpreter everywhere, and with CUDA graphs where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_fixture import make_engine
from tiny_models import make_tiny_model

from specserve.errors import ModelError, UserError

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_cases(**env: str) -> None:
    cases = Path(__file__).with_name("triton_engine_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    result = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@needs_triton
def test_the_engine_serves_on_triton_kernels_under_the_interpreter():
    run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
@needs_triton
def test_the_engine_serves_on_cuda_with_graphs():
    assert torch.cuda.is_available()
    run_cases(TRITON_INTERPRET="0")


def test_triton_without_cuda_or_interpreter_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ModelError, match=r"compile=triton needs CUDA, or Triton's interpreter \(TRITON_INTERPRET=1\)"):
        make_engine(make_tiny_model(tmp_path), compile="triton")


@needs_triton
def test_more_rows_than_the_kernels_take_are_refused_with_the_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="max_batched_tokens=9000 is more than the 8192 rows"):
        make_engine(make_tiny_model(tmp_path), compile="triton", max_batched_tokens=9000)
