"""Adapters that every peer can load, written once per model: LoRAs of all linears with seeded random weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from .. import common
from ..tasks import EXAMPLES

NUM_ADAPTERS, RANK = 8, 16


def adapter_folders(model_dir: Path) -> list[str]:
    """Their folders, made by examples/make_adapters.py where they are not in the cache."""
    key = sha256((model_dir / "config.json").read_bytes()).hexdigest()[:12]
    folder = common.cache_dir() / f"adapters-{key}-r{RANK}"
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        script = EXAMPLES / "make_adapters.py"
        command = [sys.executable, str(script), "--model", str(model_dir), "--out", str(partial)]
        command += ["--num", str(NUM_ADAPTERS), "--rank", str(RANK)]
        env = os.environ | {"PYTHONPATH": str(common.ROOT)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
        partial.rename(folder)
    return [str(folder / f"random-{i}") for i in range(NUM_ADAPTERS)]
