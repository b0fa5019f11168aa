"""Runs Triton kernels without a GPU, for the triton_*_cases.py that their tests start as processes of their own.

A process of its own because TRITON_INTERPRET must be set before triton is imported for the first time: import this
module first. Its `tl.dot` computes every row of a tile alike, as tensor cores do: numpy's matmul orders the sums of a
row by its position in the tile, and does not know bf16.
"""

from __future__ import annotations

import os
import sys
from typing import Any

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


def _fp32(handle: Any) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _row_uniform_dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    a_data, b_data = _fp32(a), np.ascontiguousarray(_fp32(b))
    rows = [np.matmul(a_data[i : i + 1].copy(), b_data) for i in range(a_data.shape[0])]
    return interpreter.TensorHandle(np.concatenate(rows) + d.data, d.dtype.scalar)


@pytest.fixture(autouse=True)
def row_uniform_dot(monkeypatch):
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _row_uniform_dot)
