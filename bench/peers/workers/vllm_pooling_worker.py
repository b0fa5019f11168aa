"""vLLM's pooling runner, CPU build: the mean of hidden states of length 1.

A request names prompts and adapters (as in worker_io.py); the answer is {"wall_s", "vectors"}.
"""

from __future__ import annotations

import time
from typing import Any

from vllm_model import load_vllm
from worker_io import Measure, serve


def load(settings: dict[str, Any]) -> tuple[dict[str, Any], Measure]:
    from vllm.config import PoolerConfig

    pooler = PoolerConfig(pooling_type="MEAN")
    llm, requests, info = load_vllm(settings, runner="pooling", convert="embed", pooler_config=pooler)

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        named = [requests[adapter] for adapter in request["adapters"]] if requests else None
        start = time.perf_counter()
        outputs = llm.embed(prompts, lora_request=named, use_tqdm=False)
        wall_s = time.perf_counter() - start
        return {"wall_s": wall_s, "vectors": [list(output.outputs.embedding) for output in outputs]}

    return info, measure


if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    serve(load)
