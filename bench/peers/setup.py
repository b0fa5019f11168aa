"""What every worker is started with: one model, the same adapters, KV memory and threads for all peers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import common
from . import vllm_cpu
from .random_adapters import RANK
from .worker import Worker, make_request

MAX_MODEL_LEN = 2048
KV_CACHE_GIB = 1
PROBE_TOKENS = 8


@dataclass(slots=True)
class Setup:
    """What every worker is started with, and what the probes found."""

    stack: contextlib.ExitStack  # ends the workers
    model_dir: Path
    adapters: list[str]
    start_timeout_s: float
    vllm_python: str | None = None
    llamacpp_python: str | None = None
    ggufs: Sequence[str] = ()
    prompts: Sequence[list[int]] = ()  # of probes
    dtypes: Sequence[str] = ()
    quantizations: Sequence[str] = ()
    probes: list[dict[str, Any]] = field(default_factory=list)

    def missing(self, peer: str) -> str | None:
        """Why `peer` cannot start, and what to do about it."""
        if peer == "vllm" and not self.vllm_python:
            return "no environment; run with --setup, or give --vllm-python"
        if peer == "llamacpp" and not (self.llamacpp_python and self.ggufs):
            return "give --llamacpp-python and --gguf"
        return None

    def start(self, peer: str, dtype: str, with_lora: bool, quantization: str = "none", gguf: str = "") -> Worker:
        settings: dict[str, Any] = {
            "model_dir": str(self.model_dir),
            "dtype": dtype,
            "adapters": self.adapters if with_lora else [],
            "rank": RANK,
            "kv_cache_gib": KV_CACHE_GIB,
            "max_model_len": MAX_MODEL_LEN,
            "quantization": quantization,
            "num_threads": common.num_cores(),
            "speculation": "auto",  # each request says whether it uses it
            "gguf": gguf,
        }
        python, env = sys.executable, {}
        if peer == "specserve":
            env["PYTHONPATH"] = str(common.ROOT)
        elif peer == "vllm":
            assert self.vllm_python is not None
            python, env = self.vllm_python, vllm_cpu.environment(self.vllm_python, KV_CACHE_GIB)
        elif peer == "llamacpp":
            assert self.llamacpp_python is not None
            python = self.llamacpp_python
        print(f"starting {peer}, {dtype}, {len(settings['adapters'])} adapters ...", flush=True)
        worker = Worker(peer, python, settings, env, self.start_timeout_s)
        self.stack.callback(worker.close)
        return worker

    def probe(self, worker: Worker, batch: int) -> float:
        """Tokens/s of a short measurement without adapters."""
        answer = worker.measure(make_request(list(self.prompts[:batch]), [None] * batch, PROBE_TOKENS, "off"))
        return batch * PROBE_TOKENS / answer["wall_s"]
