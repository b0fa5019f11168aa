"""A layer's fused linears on a device: the bits of the launches whose place they take, and when that is tried."""

from __future__ import annotations

import pytest
import torch
from linear_fused_cases import Case, check_add, check_gated, check_rope
from scaled_weight_cases import FORMATS
from triton_process import needs_triton

from specserve.kernels import linear_fused
from specserve.kernels.linear_rows import hold_one_order, release_order

COUNTS = (1, 2, 4, 5, 9, 16)


@pytest.fixture
def one_order():
    assert hold_one_order() is None
    yield
    release_order()


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("form", [None, *FORMATS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_cuda_fused_linears_have_the_bits_of_the_launches_apart(dtype, form, has_bias, one_order):
    given = (dtype, "cuda", has_bias, form)
    check_add(Case(1536, 576, *given), COUNTS)
    check_gated(Case(576, 3072, *given), "silu", COUNTS)
    check_rope(Case(576, 960, *given), (9, 3, 64), COUNTS)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("heads", [(4, 2, 24), (16, 8, 128), (4, 1, 256)], ids=str)
def test_cuda_fused_linears_of_other_models(heads, one_order):
    out_size = (heads[0] + 2 * heads[1]) * heads[2]
    check_rope(Case(2048, out_size, torch.bfloat16, "cuda"), heads, COUNTS)
    check_add(Case(2560, 960, torch.bfloat16, "cuda"), COUNTS)
    check_gated(Case(1024, 2 * 3072, torch.bfloat16, "cuda"), "gelu_tanh", COUNTS)


def test_only_small_matrices_are_fused_and_few_rows_normed():
    small, large = torch.empty(3072, 576, dtype=torch.bfloat16), torch.empty(28672, 4096, dtype=torch.bfloat16)
    assert linear_fused.is_small(small) and not linear_fused.is_small(large)
    assert linear_fused.can_norm(16, 1024) and linear_fused.can_norm(4, 4096) and linear_fused.can_norm(1, 16384)
    assert not linear_fused.can_norm(5, 2048) and not linear_fused.can_norm(1, 16400)


def test_tiles_occupy_the_device_where_they_can():
    assert [linear_fused._used(size) for size in (576, 960, 3072, 6144)] == [16, 16, 32, 64]
    assert linear_fused.ahead_of_wait(576, 2) == {"HELD": 5, "HAS_REST": False, "LINES": 16}
    assert linear_fused.ahead_of_wait(4096, 2) == {"HELD": 8, "HAS_REST": True, "LINES": 32}
    assert linear_fused.ahead_of_wait(1024, 1) == {"HELD": 0, "HAS_REST": True, "LINES": 8}
