"""The LoRA kernels under Triton's interpreter against their references; test_lora_kernels.py runs it as a process.

A process of its own because TRITON_INTERPRET must be set before triton is imported for the first time. Its
tl.dot is replaced by one that computes every row of a tile alike, as tensor cores do: numpy's matmul orders the sums of
a row by its position in the tile, and does not know bf16.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import pytest
import torch

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

import triton.language as tl
from lora_cases import IN_SIZE, OUT_SIZES, POPULARITY, make_case, make_slots, row_slots_of
from triton.runtime import interpreter

from specserve.kernels.bgmv import bgmv_reference, bgmv_triton_
from specserve.kernels.lora_stack import LoraStack
from specserve.kernels.segments import Segments
from specserve.kernels.sgmv import sgmv_reference, sgmv_triton_


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


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("popularity", POPULARITY)
def test_kernels_equal_their_references(dtype, popularity):
    x, y, stack, segments = make_case(popularity, dtype, max_segment=6, num_segments=5)
    expected = sgmv_reference(y, x, stack, segments)
    sgmv_y, bgmv_y = y.clone(), y.clone()
    sgmv_triton_(sgmv_y, x, stack, segments)
    bgmv_triton_(bgmv_y, x, stack, segments)
    torch.testing.assert_close(sgmv_y.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(sgmv_y, bgmv_y), "SGMV and BGMV must give the same bits for the same row"
    torch.testing.assert_close(expected, bgmv_reference(y, x, stack, row_slots_of(segments)))
    no_adapter = [row for row, slot in enumerate(row_slots_of(segments)) if slot == -1]
    assert torch.equal(sgmv_y[no_adapter], y[no_adapter])


@pytest.mark.parametrize("ranks", [(256, 1, 65), (64, None, 3), (None, 16, None)], ids=str)
def test_any_rank_and_untargeted_modules(ranks):
    x, y, stack, segments = make_case("identical", torch.float32, max_segment=3, num_segments=2, ranks=[ranks])
    expected = sgmv_reference(y, x, stack, segments)
    result = y.clone()
    sgmv_triton_(result, x, stack, segments)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    column = 0
    for rank, out_size in zip(ranks, stack.out_sizes, strict=True):
        if rank is None:
            assert torch.equal(result[:, column : column + out_size], y[:, column : column + out_size])
        column += out_size


def test_a_row_has_the_same_bits_wherever_it_stands():
    """A row alone, as decode sees it, and the same row deep in a prefill chunk of several tiles."""
    stack = LoraStack(make_slots([(16, 3, 64)], torch.float32), OUT_SIZES)
    x, y = torch.randn(35, IN_SIZE), torch.randn(35, sum(OUT_SIZES))
    chunk, single = y.clone(), y.clone()
    sgmv_triton_(chunk, x, stack, Segments.build([(0, 35)], 1, "cpu"))
    for row in (0, 7, 15, 16, 34):
        bgmv_triton_(single[row : row + 1], x[row : row + 1], stack, Segments.build([(0, 1)], 1, "cpu"))
        assert torch.equal(single[row], chunk[row])


def test_rows_may_be_strided():
    x, y, stack, segments = make_case("uniform", torch.float32, max_segment=3, num_segments=4)
    wide_x, wide_y = torch.randn(len(x), IN_SIZE + 5), torch.randn(len(y), y.shape[1] + 7)
    wide_x[:, :IN_SIZE], wide_y[:, : y.shape[1]] = x, y
    rest = wide_y[:, y.shape[1] :].clone()
    sgmv_triton_(y, x, stack, segments)
    sgmv_triton_(wide_y[:, : y.shape[1]], wide_x[:, :IN_SIZE], stack, segments)
    assert torch.equal(wide_y[:, : y.shape[1]], y) and torch.equal(wide_y[:, y.shape[1] :], rest)
