"""Linear layers with one order of sums under Triton's interpreter; test_under_triton.py runs this file as a process."""

from __future__ import annotations

import linear_row_cases
import pytest
import torch
from engine_fixture import make_engine
from linear_row_cases import BIASES
from tiny_models import make_tiny_model
from triton_interpreter import row_uniform_dot  # noqa: F401  (before anything imports triton)

from specserve.compute.cuda.decoder import TritonDecoder
from specserve.drafting.cost_model import CostModel
from specserve.errors import ModelError
from specserve.kernels.linear_rows import linear_rows


@pytest.mark.parametrize("has_bias", BIASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(8, 8), (200, 72), (264, 100)], ids=str)
def test_rows_equal_the_definition(sizes, dtype, has_bias):
    linear_row_cases.check_definition(*sizes, dtype, has_bias, "cpu", (1, 3, 16, 17, 32, 33, 64, 65, 130))


def test_tiles_of_many_outputs_equal_the_definition():
    linear_row_cases.check_definition(24, 16392, torch.bfloat16, True, "cpu", (3, 17))


def test_a_row_has_the_same_bits_at_every_number_of_rows_and_place():
    linear_row_cases.check_bits(264, 100, torch.bfloat16, "cpu", (1, 5, 16, 17, 33, 64))


def test_the_engine_multiplies_by_it_where_exact_is_on(tmp_path, monkeypatch):
    monkeypatch.setattr("specserve.engine.engine.measured_costs", lambda *_: CostModel({1: 0.01, 64: 0.02}))
    model_dir = make_tiny_model(tmp_path)
    engine = make_engine(model_dir, kernels="triton", exact="on", dtype="bf16")
    assert isinstance(engine.decoder, TritonDecoder) and engine.info.is_exact
    assert engine.decoder.lm_head._product is linear_rows
    assert engine.decoder.layers[-1].down._product is linear_rows
    with pytest.raises(ModelError, match="exact=on cannot be kept: weights are float32"):
        make_engine(model_dir, kernels="triton", exact="on", dtype="fp32")
