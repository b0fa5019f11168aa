"""Which kernels serve: by the setting and the device, falling back only where nobody insisted."""

from __future__ import annotations

import importlib.util
import os
import re
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_tiny_model

from specserve.compute.cuda import one_order
from specserve.compute.cuda.buckets import ROW_BUCKETS
from specserve.compute.cuda.choice import TritonChoice, choose_triton
from specserve.compute.device_choice import choose_device
from specserve.compute.loader import choose_paths, load_model
from specserve.compute.native.choice import choose_native
from specserve.compute.torch.decoder import Decoder
from specserve.config import EngineConfig
from specserve.errors import ModelError, UserError
from specserve.kernels.linear import Linear

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def with_triton(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.mark.parametrize(
    "kernels,device,choice",
    [
        ("torch", CUDA, None),
        ("auto", CUDA, TritonChoice(is_required=False)),
        ("native", CUDA, TritonChoice(is_required=True)),
        ("triton", CUDA, TritonChoice(is_required=True)),
        ("torch", CPU, None),
        ("auto", CPU, None),
        ("native", CPU, None),
    ],
)
def test_triton_serves_on_cuda_unless_torch_was_asked_for(kernels, device, choice, with_triton):
    assert choose_triton(EngineConfig(kernels=kernels), device) == choice


def test_a_quantization_on_cuda_is_tritons_or_refused(with_triton, monkeypatch):
    for form in ("int8", "fp8"):
        config = EngineConfig(quantization=form)
        assert choose_paths(config, CUDA) == [TritonChoice(is_required=True, quantization=form)]
    with pytest.raises(ModelError, match="quantization=int4 is for CPUs; on CUDA set it to int8 or fp8"):
        choose_paths(EngineConfig(quantization="int4"), CUDA)
    with pytest.raises(ModelError, match="quantization=int8 needs Triton's kernels, and kernels is torch"):
        choose_paths(EngineConfig(quantization="int8", kernels="torch"), CUDA)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="quantization=fp8 needs triton, which is not installed"):
        choose_paths(EngineConfig(quantization="fp8"), CUDA)


def test_a_model_that_has_no_8_bits_on_cuda_is_refused_with_the_reason(tmp_path):
    choices = [TritonChoice(is_required=True, quantization="int8")]
    with pytest.raises(ModelError, match="quantization=int8 has activations of 16 bits, and .* float32; --dtype bf16"):
        load_model(make_tiny_model(tmp_path / "a"), CPU, choices=choices)
    with pytest.raises(ModelError, match="quantization=int8 needs multiples of 16 inputs, not 72"):
        load_model(make_tiny_model(tmp_path / "b", intermediate_size=72), CPU, "bf16", choices)


def test_exact_on_is_for_paths_that_keep_a_rows_bits(with_triton):
    assert choose_triton(EngineConfig(exact="on"), CUDA) == TritonChoice(is_required=True, exact="on")
    for device in (CPU, CUDA):
        assert choose_paths(EngineConfig(kernels="torch"), device) == []
        with pytest.raises(ModelError, match="exact=on needs the native path or Triton's, and torch would serve"):
            choose_paths(EngineConfig(kernels="torch", exact="on"), device)


@pytest.mark.parametrize("exact", ["auto", "off"])
def test_matrix_products_are_torchs_where_exact_is_off_or_the_device_has_no_say(tmp_path, exact, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "")
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION")
    decoder = load_model(make_tiny_model(tmp_path), CPU, "bf16", [TritonChoice(exact=exact)])
    assert not decoder.is_exact
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == "1"  # or Triton warns, and its next version rounds otherwise


def test_a_device_that_sums_differently_is_found_out(monkeypatch):
    released: list[bool] = []
    monkeypatch.setattr(one_order, "release_order", lambda: released.append(True))

    def differing(weight, counts):
        assert set(counts) == set(ROW_BUCKETS)  # a library chooses by the rows, and so it is asked for all
        return [640] if weight.shape[0] == 128 else []

    monkeypatch.setattr(one_order, "rows_that_differ", differing)
    weights = [torch.zeros(n, 64, dtype=torch.bfloat16) for n in (64, 128)]
    assert one_order.sums_differ(weights[:1]) is None and not released
    assert one_order.sums_differ(weights) == "cuBLASLt and our kernel sum a [128, 64] matrix differently at [640] rows"
    assert released
    assert "not a multiple of 8" in one_order.cannot_be([torch.zeros(8, 12, dtype=torch.float16)])
    with pytest.raises(ModelError, match="exact=on cannot be kept: weights are float32"):
        one_order.keep_one_order("on", None, [], Linear(torch.zeros(8, 8)))


def test_a_device_whose_tiles_of_attention_sum_differently_is_found_out(monkeypatch):
    released: list[bool] = []
    monkeypatch.setattr(one_order, "release_order", lambda: released.append(True))
    monkeypatch.setattr(one_order, "cannot_be", lambda weights: None)
    monkeypatch.setattr(one_order, "tiles_that_differ", lambda config, dtype, device: [16, 32])
    weight = SimpleNamespace(device=CUDA, dtype=torch.bfloat16)
    lm_head = SimpleNamespace(unpacked=lambda: weight, multiply_by=lambda product: pytest.fail("it is not exact"))
    assert not one_order.keep_one_order("auto", None, [], lm_head) and released
    with pytest.raises(ModelError, match=r"attention sums differently in tiles of \[16, 32\] rows than of one"):
        one_order.keep_one_order("on", None, [], lm_head)


def test_a_device_on_which_our_products_do_not_run_multiplies_by_its_library(monkeypatch):
    def refused(weight, counts):
        raise RuntimeError("out of resource: shared memory")

    released: list[bool] = []
    monkeypatch.setattr(one_order, "release_order", lambda: released.append(True))
    monkeypatch.setattr(one_order, "rows_that_differ", refused)
    reason = one_order.sums_differ([torch.zeros(64, 64, dtype=torch.bfloat16)])
    assert reason is not None and "does not run on a [64, 64] matrix here" in reason and "shared memory" in reason
    assert released


def test_torch_is_neither_native_nor_triton_on_any_device():
    config = EngineConfig(kernels="torch")
    assert all(choose(config, device) is None for choose in (choose_native, choose_triton) for device in (CPU, CUDA))


def test_before_ampere_and_on_other_makes_torch_serves_unless_the_kernels_were_asked_for(
    with_triton, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert choose_triton(EngineConfig(), CUDA) is None
    assert "needs an NVIDIA GPU, which torch" in caplog.text
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_triton(EngineConfig(), CUDA) is None
    wanted = r"needs a device of compute capability 8\.0 or newer \(A100, RTX 30\), and cuda has 7\.5"
    assert re.search(wanted, caplog.text)
    for wants, name in ((EngineConfig(kernels="triton"), "kernels=triton"), (EngineConfig(quantization="fp8"), "=fp8")):
        with pytest.raises(ModelError, match=f"{name} {wanted}"):
            choose_triton(wants, CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_triton(EngineConfig(), CUDA) == TritonChoice()


def test_without_triton_torch_serves_on_cuda_unless_it_was_asked_for(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_triton(EngineConfig(), CUDA) is None
    assert "needs triton, which is not installed: torch serves instead" in caplog.text
    for kernels in ("native", "triton"):
        with pytest.raises(ModelError, match=f"kernels={kernels} needs triton"):
            choose_triton(EngineConfig(kernels=kernels), CUDA)


def test_a_model_that_triton_cannot_serve_is_torchs_unless_triton_was_asked_for(tmp_path, caplog):
    model_dir = make_tiny_model(tmp_path, head_dim=12)
    assert isinstance(load_model(model_dir, CPU, choices=[TritonChoice()]), Decoder)
    assert "head_dim=12 is not a multiple of 8 up to 256" in caplog.text
    with pytest.raises(ModelError, match="asked for and cannot serve this model: head_dim=12"):
        load_model(model_dir, CPU, choices=[TritonChoice(is_required=True)])


def test_cuda_that_is_not_there_is_refused_and_not_an_internal_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(EngineConfig()) == CPU
    with pytest.raises(UserError, match="device=cuda needs a CUDA GPU"):
        choose_device(EngineConfig(device="cuda"))
