"""`Linear` multiplies as F.linear does, in whichever form its weights are held."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from specserve.kernels import linear
from specserve.kernels.linear import Linear, compute_dtype, packs_weights

CPU = torch.device("cpu")


@pytest.fixture
def no_native_bf16(monkeypatch):
    monkeypatch.setattr(linear, "has_native_bf16", lambda: False)


def random_weight(size_out, size_in, dtype):
    generator = torch.Generator().manual_seed(size_out)
    return (torch.randn(size_out, size_in, generator=generator) * 0.05).to(dtype)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", [(64, 64), (1, 8), (33, 17), (960, 576)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_form_equals_float32(no_native_bf16, shape, dtype, bias):
    weight = random_weight(*shape, dtype)
    offset = torch.randn(shape[0]).to(dtype) if bias else None
    layer = Linear(weight, offset)
    for rows in (1, 2, 5, 16, 97):
        x = torch.randn(rows, shape[1])
        expected = F.linear(x, weight.float(), None if offset is None else offset.float())
        y = layer(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(layer.unpacked().float(), weight.float(), atol=2**-25, rtol=0)


def test_a_row_gives_nearly_the_same_result_in_any_number_of_rows(no_native_bf16):
    layer = Linear(random_weight(96, 64, torch.bfloat16))
    x = torch.randn(64, 64)
    torch.testing.assert_close(torch.cat([layer(row[None]) for row in x]), layer(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("value", [1e5, -3e38, float("inf")])
def test_weights_beyond_fp16_stay_float32(no_native_bf16, caplog, value):
    weight = random_weight(8, 16, torch.bfloat16)
    weight[3, 5] = value
    with caplog.at_level(logging.WARNING):
        layer = Linear(weight)
    assert "fp16" in caplog.text
    assert torch.equal(layer.unpacked(), weight.float())
    x = torch.randn(2, 16)
    assert torch.equal(layer(x), F.linear(x, weight.float()))


def test_the_largest_fp16_value_is_packed(no_native_bf16):
    weight = torch.full((4, 4), 65280.0, dtype=torch.bfloat16)  # the largest bf16 below fp16's limit
    assert torch.equal(Linear(weight)(torch.ones(1, 4)), torch.full((1, 4), 4 * 65280.0))


def test_the_arithmetic_follows_the_cpu(monkeypatch):
    monkeypatch.setattr(linear, "has_native_bf16", lambda: True)
    assert compute_dtype(torch.bfloat16, CPU) == torch.bfloat16
    assert not packs_weights(torch.bfloat16, CPU)
    assert packs_weights(torch.float16, CPU)  # no CPU that we know of multiplies fp16 faster than packed
    monkeypatch.setattr(linear, "has_native_bf16", lambda: False)
    assert compute_dtype(torch.bfloat16, CPU) == torch.float32
    assert compute_dtype(torch.float32, CPU) == torch.float32
    cuda = torch.device("cuda")
    assert compute_dtype(torch.bfloat16, cuda) == torch.bfloat16 and not packs_weights(torch.float16, cuda)


def test_native_bf16_keeps_the_matrix(monkeypatch):
    monkeypatch.setattr(linear, "has_native_bf16", lambda: True)
    weight = random_weight(8, 16, torch.bfloat16)
    x = torch.randn(3, 16).bfloat16()
    y = Linear(weight)(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, F.linear(x, weight))
