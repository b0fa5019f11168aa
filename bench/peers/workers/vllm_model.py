"""A model in vLLM and its LoRAs, as both of its workers load them; enable_lora only where there are adapters.

Everything is vLLM's default but prefix caching, which is off for every peer, and the context length.
"""

from __future__ import annotations

from typing import Any

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def load_vllm(settings: dict[str, Any], **more: Any) -> tuple[Any, list[Any], dict[str, Any]]:
    """(vllm.LLM, a LoRARequest for each adapter, what the worker says of itself)."""
    import torch
    import vllm
    from vllm.lora.request import LoRARequest

    lora: dict[str, Any] = {}
    if settings["adapters"]:
        num = len(settings["adapters"])
        lora = {"enable_lora": True, "max_loras": num, "max_cpu_loras": num, "max_lora_rank": settings["rank"]}
    llm = vllm.LLM(
        settings["model_dir"],
        dtype=DTYPES[settings["dtype"]],
        max_model_len=settings["max_model_len"],
        enable_prefix_caching=False,
        **lora,
        **more,
    )
    requests = [LoRARequest(f"lora-{i}", i + 1, path) for i, path in enumerate(settings["adapters"])]
    return llm, requests, {"version": vllm.__version__, "torch": torch.__version__, "dtype": settings["dtype"]}
