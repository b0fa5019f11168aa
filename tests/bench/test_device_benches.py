"""GPU benches run at tiny sizes without a GPU, lest they fail on the first one."""

from __future__ import annotations

import pytest
from bench_process import bench_record
from triton_process import needs_triton


@needs_triton
@pytest.mark.parametrize("name", ["sampling_kernels", "head_loop", "linear_rows", "scaled_weights"])
def test_benches_run_dry_and_end_in_their_json_line(name):
    record = bench_record(name, "--dry-run")
    assert record["dry_run"] and record["results"]


@needs_triton
@pytest.mark.parametrize("quantization", ["none", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_bench_of_steps_runs_the_runner_in_the_interpreter(quantization):
    options = [
        "--quantization",
        quantization,
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--context",
        "20",
        "--seqs",
        "2",
    ]
    if quantization != "none":  # so that linears are fused
        options += ["--exact", "on"]
    record = bench_record("gpu_steps", *options, TRITON_INTERPRET="1")
    fused = {"fused_ratio", "fused_verify_ratio", "ms_of_one_row"} if quantization != "none" else set()
    assert set(record["figures"]) == {"floor_ratio", "verify_ratio", "lora_share"} | fused
