"""A layer's fused linears on a device: the bits of the launches whose place they take, and when that is tried."""

from __future__ import annotations

import pytest
import torch
from linear_fused_cases import Case, check_add, check_gated, check_rope
from scaled_weight_cases import FORMATS
from triton_process import needs_triton

from specserve.kernels import linear_fused
from specserve.kernels.add_norm import add_rms_norm_
from specserve.kernels.gated_activation import gated_activation
from specserve.kernels.linear_rows import hold_one_order, release_order
from specserve.kernels.rope_kv import rope_store_

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


class Launched:
    """In a kernel's place: keeps what a launch says."""

    def __init__(self):
        self.options = {}

    def __getitem__(self, grid):
        return lambda *_, **options: self.options.update(options)


@needs_triton
@pytest.mark.parametrize(
    "name,launch",
    [
        ("add_norm_triton.add_rms_norm_kernel", lambda rows: add_rms_norm_(rows.float(), rows, rows[0].float(), 1e-5)),
        ("gated_activation_triton.gated_activation_kernel", lambda rows: gated_activation(rows, "silu")),
        (
            "rope_kv_triton.rope_store_kernel",
            lambda rows: rope_store_(
                rows, rows[:, :16].float(), rows[:, :16].float(), torch.arange(2), *rows.new_zeros(2, 2, 1, 16), 2, 1,
                None, None, 0.0,
            ),
        ),
        (
            "linear_fused_triton.linear_add_kernel",
            lambda rows: linear_fused.linear_add_(rows.float(), rows, rows.new_ones(64, 64)),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_kernels_that_take_each_others_place_round_as_they_are_written(name, launch, monkeypatch):
    launched = Launched()
    monkeypatch.setattr(f"specserve.kernels.{name}", launched)
    launch(torch.ones(2, 64, dtype=torch.bfloat16))
    assert launched.options["enable_fp_fusion"] is False
