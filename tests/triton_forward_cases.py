"""The forward pass's kernels under Triton's interpreter; test_forward_kernels.py runs this file as a process.

A process of its own because TRITON_INTERPRET must be set before triton is imported for the first time.
"""

from __future__ import annotations

import os
import sys

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import elementwise_cases
import pytest
import torch
from elementwise_cases import HEADS, NORM_SIZES, TOLERANCE

from specserve.kernels import add_norm
from specserve.kernels.gated_activation import BLOCK, KINDS


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden", NORM_SIZES)
def test_addition_and_norm(dtype, hidden):
    elementwise_cases.check_add_norm(dtype, hidden, "cpu")


def test_addition_and_norm_with_a_residual_in_float32():
    elementwise_cases.check_add_norm(torch.bfloat16, 72, "cpu", torch.float32)


def test_rows_longer_than_a_block(monkeypatch):
    monkeypatch.setattr(add_norm, "MAX_BLOCK", 64)
    for dtype in TOLERANCE:
        elementwise_cases.check_add_norm(dtype, 200, "cpu")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_norms_rotation_and_kv_write(dtype, heads):
    elementwise_cases.check_rope(dtype, heads, "cpu")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gated_activation(dtype, kind):
    for size in (8, 100, BLOCK + 12):
        elementwise_cases.check_activation(dtype, kind, size, "cpu")
