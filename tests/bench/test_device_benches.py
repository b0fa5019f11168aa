"""GPU benches run at tiny sizes without a GPU, lest they fail on the first one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from places import ROOT


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", ["sampling_kernels", "head_loop"])
def test_benches_run_dry_and_end_in_their_json_line(name):
    command = [sys.executable, "-m", f"bench.{name}", "--dry-run"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-4000:]
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["bench"] == name and record["dry_run"] and record["results"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_bench_of_steps_runs_the_runner_in_the_interpreter():
    options = ["--shape", "tiny", "--device", "cpu", "--rounds", "1", "--context", "20", "--seqs", "2"]
    command = [sys.executable, "-m", "bench.gpu_steps", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-4000:]
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["bench"] == "gpu_steps" and set(record["figures"]) == {"floor_ratio", "verify_ratio", "lora_share"}
