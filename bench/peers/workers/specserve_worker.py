"""specserve in process: the engine alone, no server. One engine serves requests with and without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from worker_io import Measure, Recorder, serve

from specserve import __version__
from specserve.config import EngineConfig
from specserve.engine.engine import Engine
from specserve.messages import GenerateRequest, GrammarSpec, RequestFailed, SamplingParams, Speculation


def load(settings: dict[str, Any]) -> tuple[dict[str, Any], Measure]:
    config = EngineConfig(
        device="cpu",
        dtype=settings["dtype"],
        kv_cache_gib=settings["kv_cache_gib"],
        max_model_len=settings["max_model_len"],
        prefix_caching=False,
        num_threads=settings["num_threads"],
        speculation=settings["speculation"],
        quantization=settings["quantization"],
    )
    engine = Engine(config, Path(settings["model_dir"]))
    hashes = [engine.load_adapter(f"lora-{i}", path).content_hash for i, path in enumerate(settings["adapters"])]
    num_measured = 0

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal num_measured
        num_measured += 1
        sampling = SamplingParams(max_tokens=request["num_tokens"], temperature=0.0, ignore_eos=request["ignore_eos"])
        speculation = Speculation(mode=request["mode"])
        recorder = Recorder(len(request["prompts"]), request["ignore_eos"])
        index_of = {}
        for idx, (prompt, adapter) in enumerate(zip(request["prompts"], request["adapters"], strict=True)):
            request_id = f"{num_measured}-{idx}"
            index_of[request_id] = idx
            adapter_hash = None if adapter is None else hashes[adapter]
            schema = request["schemas"][idx] if request.get("schemas") else None
            engine.add_request(
                GenerateRequest(
                    request_id,
                    prompt,
                    sampling,
                    adapter_hash=adapter_hash,
                    speculation=speculation,
                    grammar=None if schema is None else GrammarSpec("json_schema", schema),
                )
            )
        while engine.has_work():
            events: list[Any] = engine.step()
            for event in events:
                if isinstance(event, RequestFailed):
                    raise RuntimeError(event.error.message)
            recorder.add_step((index_of[delta.request_id], delta.token_ids) for delta in events)
        return recorder.result()

    info = {"version": __version__, "dtype": engine.info.dtype, "threads": torch.get_num_threads()}
    return info, measure


if __name__ == "__main__":
    serve(load)
