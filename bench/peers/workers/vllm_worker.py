"""vLLM's engine, CPU build, without its server; with enable_lora only where there are adapters.

Everything is vLLM's default but prefix caching, which is off for every peer, and the context length. The environment
(KV space, threads) is set by `bench.peers`.
"""

from __future__ import annotations

from typing import Any

from worker_io import Measure, Recorder, serve

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def load(settings: dict[str, Any]) -> tuple[dict[str, Any], Measure]:
    import torch
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    lora: dict[str, Any] = {}
    if settings["adapters"]:
        num = len(settings["adapters"])
        lora = {"enable_lora": True, "max_loras": num, "max_cpu_loras": num, "max_lora_rank": settings["rank"]}
    llm = LLM(
        settings["model_dir"],
        dtype=DTYPES[settings["dtype"]],
        max_model_len=settings["max_model_len"],
        enable_prefix_caching=False,
        **lora,
    )
    requests = [LoRARequest(f"lora-{i}", i + 1, path) for i, path in enumerate(settings["adapters"])]
    engine = llm.llm_engine
    num_measured = 0

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal num_measured
        num_measured += 1
        recorder = Recorder(len(request["prompts"]), request["ignore_eos"])
        for idx, (prompt, adapter) in enumerate(zip(request["prompts"], request["adapters"], strict=True)):
            schema = request["schemas"][idx] if request.get("schemas") else None
            engine.add_request(
                f"{num_measured}-{idx}",
                {"prompt_token_ids": prompt},
                SamplingParams(
                    temperature=0.0,
                    max_tokens=request["num_tokens"],
                    ignore_eos=request["ignore_eos"],
                    output_kind=RequestOutputKind.DELTA,
                    structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
                ),
                lora_request=None if adapter is None else requests[adapter],
            )
        while engine.has_unfinished_requests():
            outputs = engine.step()
            # The engine may append to the id it was given.
            recorder.add_step(
                (int(output.request_id.split("-")[1]), list(output.outputs[0].token_ids)) for output in outputs
            )
        return recorder.result()

    info = {"version": vllm.__version__, "torch": torch.__version__, "dtype": settings["dtype"]}
    return info, measure


if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    serve(load)
