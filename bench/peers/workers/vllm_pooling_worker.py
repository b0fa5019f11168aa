"""vLLM's pooling runner, CPU build: the mean of hidden states of length 1; enable_lora only where there are adapters.

A request names prompts and adapters (as in worker_io.py); the answer is {"wall_s", "vectors"}. Everything else is
vLLM's default but prefix caching, which is off.
"""

from __future__ import annotations

import time
from typing import Any

from worker_io import Measure, serve

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def load(settings: dict[str, Any]) -> tuple[dict[str, Any], Measure]:
    import torch
    import vllm
    from vllm import LLM
    from vllm.config import PoolerConfig
    from vllm.lora.request import LoRARequest

    lora: dict[str, Any] = {}
    if settings["adapters"]:
        num = len(settings["adapters"])
        lora = {"enable_lora": True, "max_loras": num, "max_cpu_loras": num, "max_lora_rank": settings["rank"]}
    llm = LLM(
        settings["model_dir"],
        runner="pooling",
        convert="embed",
        pooler_config=PoolerConfig(pooling_type="MEAN"),
        dtype=DTYPES[settings["dtype"]],
        max_model_len=settings["max_model_len"],
        enable_prefix_caching=False,
        **lora,
    )
    requests = [LoRARequest(f"lora-{i}", i + 1, path) for i, path in enumerate(settings["adapters"])]

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        named = [requests[adapter] for adapter in request["adapters"]] if requests else None
        start = time.perf_counter()
        outputs = llm.embed(prompts, lora_request=named, use_tqdm=False)
        wall_s = time.perf_counter() - start
        return {"wall_s": wall_s, "vectors": [list(output.outputs.embedding) for output in outputs]}

    info = {"version": vllm.__version__, "torch": torch.__version__, "dtype": settings["dtype"]}
    return info, measure


if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    serve(load)
