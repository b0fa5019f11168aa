"""The kernels of the GPU's forward pass equal their definitions: torch path, interpreter, compiler, and CUDA."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import elementwise_cases
import pytest
import torch
from elementwise_cases import HEADS, NORM_SIZES, TOLERANCE

from specserve.kernels.gated_activation import KINDS, gated_activation

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_triton])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden", [*NORM_SIZES, 20000])
def test_addition_and_norm(dtype, hidden, device):
    elementwise_cases.check_add_norm(dtype, hidden, device)
    elementwise_cases.check_add_norm(dtype, hidden, device, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_norms_rotation_and_kv_write(dtype, heads, device):
    elementwise_cases.check_rope(dtype, heads, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8, 100, 1536])
def test_gated_activation(dtype, kind, size, device):
    elementwise_cases.check_activation(dtype, kind, size, device)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="kind='relu': must be one of silu, gelu_tanh"):
        gated_activation(torch.zeros(1, 2), "relu")


def test_kernels_import_without_triton():
    modules = "add_norm, gated_activation, rope_kv".replace(" ", " specserve.kernels.")
    code = f"import sys; sys.modules['triton'] = None; import specserve.kernels.{modules}"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)


@needs_triton
def test_triton_kernels_under_the_interpreter():
    cases = Path(__file__).with_name("triton_forward_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@needs_triton
def test_triton_kernels_compile_for_hopper(tmp_path):
    script = Path(__file__).with_name("triton_forward_compile.py")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(script.parents[1])}
    result = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
