"""Weights of 8 bits with a scale for each output: what they are, and their products on a device."""

from __future__ import annotations

import pytest
import torch
from scaled_weight_cases import FORMATS, check_scaled_bits, check_scaled_definition
from triton_process import needs_triton

from specserve.kernels import scaled_weights
from specserve.kernels.device_limits import MOST_SHARED
from specserve.kernels.linear_rows import BLOCK_K, Tile
from specserve.kernels.scaled_weights import ScaledLinear, choose_scaled_tile, quantize_outputs

# (K, N): of SmolLM2-135M, then Llama-8B's o and down.
SIZES = ((576, 960), (1536, 576), (576, 49152), (4096, 4096), (14336, 4096))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_each_output_has_its_scale_and_its_largest_weight_exactly(form, dtype, monkeypatch):
    monkeypatch.setattr(scaled_weights, "_VALUES_AT_ONCE", 300)  # several outputs, and not all, at once
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 96, generator=generator) * torch.logspace(-4, 2, 10).unsqueeze(1)
    weight[3] = 0
    weight = weight.to(dtype)
    weights = quantize_outputs(weight, form)
    unpacked = ScaledLinear(weight, None, form).unpacked()
    error = (unpacked - weight.float()).abs() / weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30)
    assert error.max() <= (0.5 / 127 if form == "int8" else 2**-4) * 1.001
    assert weights.scales[3] == 0 and not unpacked[3].any() and weights.scales.isfinite().all()
    places = weight.float().abs().argmax(1, keepdim=True)
    torch.testing.assert_close(unpacked.gather(1, places), weight.float().gather(1, places), rtol=1e-6, atol=0)


def test_a_tile_follows_from_the_sizes_and_fits_into_shared_memory():
    assert choose_scaled_tile(1, 4096) == Tile(16, 64, 16) and choose_scaled_tile(64, 9728) == Tile(64, 64, 4)
    assert choose_scaled_tile(65, 4096) == Tile(128, 64, 4) and choose_scaled_tile(512, 4096) == Tile(128, 128, 4, 8)
    for num_rows in (1, 16, 17, 64, 65, 128, 2048):
        for out_size in (16, 576, 4096, 9728, 128256):
            tile = choose_scaled_tile(num_rows, out_size)
            assert tile.rows >= min(num_rows, 128) and tile.num_stages >= 2
            assert (2 * tile.rows + tile.columns) * BLOCK_K * tile.num_stages < MOST_SHARED


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(576, 960), (208, 72), (144, 9728), (144, 16392)], ids=str)
def test_cuda_rows_equal_the_definition(sizes, dtype, form):
    check_scaled_definition(*sizes, dtype, form, "cuda", (1, 16, 17, 33, 64, 65, 130, 300))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_cuda_rows_have_the_same_bits_at_every_number_of_rows_and_place(sizes, form):
    check_scaled_bits(*sizes, form, "cuda", (*range(1, 257), 300, 512, 1024, 2048))
