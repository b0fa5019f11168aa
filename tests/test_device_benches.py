"""The benches of sampling and of the heads' loop run at tiny sizes without a GPU, lest they fail on the first one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("name", ["sampling_kernels", "head_loop"])
def test_benches_run_dry_and_end_in_their_json_line(name):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", f"bench.{name}", "--dry-run"]
    env = os.environ | {"PYTHONPATH": str(root)}
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-4000:]
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["bench"] == name and record["dry_run"] and record["results"]
