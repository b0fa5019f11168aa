"""Triton is there on Linux alone: nothing but the files of Triton kernels may import it when it is imported."""

import os
import subprocess
import sys

from places import ROOT


def test_kernels_and_what_launches_them_import_without_triton():
    kernels = [path.stem for path in sorted((ROOT / "kernels").glob("*.py")) if not path.stem.endswith("_triton")]
    assert {"lora_blocks", "sampling", "ragged_attention"} < set(kernels)
    modules = [f"specserve.kernels.{name}" for name in kernels] + ["specserve.drafters.head_device"]
    code = f"import sys; sys.modules['triton'] = None; import {', '.join(modules)}"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
