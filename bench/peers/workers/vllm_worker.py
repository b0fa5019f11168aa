"""vLLM's engine, CPU build, without its server. The environment (KV space, threads) is set by `bench.peers`."""

from __future__ import annotations

from typing import Any

from vllm_model import load_vllm
from worker_io import Measure, Recorder, serve


def load(settings: dict[str, Any]) -> tuple[dict[str, Any], Measure]:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    llm, requests, info = load_vllm(settings)
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

    return info, measure


if __name__ == "__main__":  # vLLM starts its processes by importing this file again
    serve(load)
