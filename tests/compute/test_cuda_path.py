"""The engine on the Triton path: through the interpreter everywhere, and with CUDA graphs where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from engine_fixture import make_engine
from tiny_models import make_tiny_model
from triton_process import needs_triton, quick_and_all, run_cases

from specserve.compute.cuda.sampler import _Buffers
from specserve.errors import ModelError, UserError
from specserve.kernels.sampling import SamplingRow


@pytest.mark.long
@needs_triton
@quick_and_all
def test_the_engine_serves_on_triton_kernels_under_the_interpreter(all_of_them):
    run_cases("triton_engine_cases.py", all_of_them=all_of_them)


@pytest.mark.gpu
@needs_triton
def test_the_engine_serves_on_cuda_with_graphs():
    assert torch.cuda.is_available()
    run_cases("triton_engine_cases.py", all_of_them=True, interpret="0")


def test_triton_without_cuda_or_interpreter_is_refused_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ModelError, match=r"kernels=triton needs CUDA, or Triton's interpreter \(TRITON_INTERPRET=1\)"):
        make_engine(make_tiny_model(tmp_path), kernels="triton")


@needs_triton
def test_more_rows_than_the_kernels_take_are_refused_with_the_limit(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="max_batched_tokens=9000 is more than the 8192 rows"):
        make_engine(make_tiny_model(tmp_path), kernels="triton", max_batched_tokens=9000)


def test_sampling_parameters_on_the_device_are_those_of_the_step_when_none_are_sent():
    buffers = _Buffers(4, 100, torch.device("cpu"))
    greedy, hot = SamplingRow(), SamplingRow(0.7, 5, 0.9, 0.1, 0.25)
    for rows, masked in (
        ([], []), ([hot], []), ([], []), ([], []), ([], [3, 1]), ([], []), ([hot], [0, 2]), ([hot] * 4, []), ([], [2]),
        ([greedy, hot], []),
    ):  # fmt: skip
        buffers.upload(rows, masked)
        params = buffers._params
        fields = (getattr(params, name).tolist() for name in SamplingRow._fields)
        want = [*rows, *[greedy] * (4 - len(rows))]
        for idx, row in enumerate(masked):
            want[row] = want[row]._replace(mask_row=idx)
        assert [list(row) for row in zip(*fields, strict=True)] == [pytest.approx(list(row)) for row in want]
