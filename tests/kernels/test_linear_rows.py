"""Linear layers whose rows keep their bits, on a device: the definition, and the same bits at every number of rows."""

from __future__ import annotations

import linear_row_cases
import pytest
import torch
from triton_process import needs_triton, run_cases

from specserve.kernels.device_limits import MOST_SHARED
from specserve.kernels.linear_rows import (
    MOST_TILED_ROWS,
    Tile,
    choose_tile,
    hold_one_order,
    release_order,
    rows_that_differ,
)

# (K, N): SmolLM2-135M's linears and lm_head, then Llama-8B's o and down, whose bits follow the rows in cuBLAS.
SIZES = ((576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152), (4096, 4096), (14336, 4096))
LARGE = (384, 512, 640, 1024, 2048)


@pytest.fixture
def one_order():
    assert hold_one_order() is None
    yield
    release_order()


def test_a_tile_follows_from_the_sizes_and_fits_into_shared_memory():
    assert choose_tile(1, 576) == choose_tile(16, 6144) == Tile(16, 64, 9)
    assert choose_tile(17, 49152) == Tile(32, 128, 4) and choose_tile(64, 9728) == Tile(64, 64, 3)
    for num_rows in range(1, MOST_TILED_ROWS + 1):
        for out_size in (8, 4096, 9728, 128256):
            tile = choose_tile(num_rows, out_size)
            assert tile.rows >= num_rows
            assert 2 * 128 * (tile.rows + tile.columns) * tile.num_stages < MOST_SHARED


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(576, 960), (200, 72), (136, 9728), (136, 16392)], ids=str)
def test_cuda_rows_equal_the_definition(sizes, dtype, one_order):
    for has_bias in linear_row_cases.BIASES:
        linear_row_cases.check_definition(*sizes, dtype, has_bias, "cuda", (1, 16, 17, 33, 64, 65, 130))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cuda_rows_have_the_same_bits_at_every_number_of_rows_and_place(sizes, one_order):
    linear_row_cases.check_bits(*sizes, torch.bfloat16, "cuda", (*range(1, 257), *LARGE))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_check_at_start_finds_what_cublas_does_by_itself(dtype):
    weight = torch.randn(4096, 14336, device="cuda").to(dtype)
    assert rows_that_differ(weight)  # Llama-8B's down: cuBLAS splits K
    assert hold_one_order() is None
    try:
        assert rows_that_differ(weight) == []
    finally:
        release_order()


@pytest.mark.gpu
@needs_triton
def test_a_graph_keeps_the_descriptors_that_it_was_captured_with():
    linear_row_cases.check_in_a_graph(576, 960, torch.bfloat16)


@pytest.mark.gpu
@needs_triton
def test_an_engine_on_cuda_answers_with_the_same_bits_in_any_company():
    run_cases("triton_linear_cases.py", all_of_them=True, interpret="0")
