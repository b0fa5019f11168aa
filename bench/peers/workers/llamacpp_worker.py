"""llama.cpp through llama-cpp-python: batch 1, no adapters (it has no mixed-adapter batch)."""

from __future__ import annotations

from typing import Any

from worker_io import Measure, Recorder, serve


def load(settings: dict[str, Any]) -> tuple[dict[str, Any], Measure]:
    import llama_cpp

    llama = llama_cpp.Llama(
        settings["gguf"],
        n_ctx=settings["max_model_len"],
        n_threads=settings["num_threads"],
        n_threads_batch=settings["num_threads"],
        verbose=False,
    )

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        (prompt,) = request["prompts"]
        recorder = Recorder(1, request["ignore_eos"])
        stream = llama.generate(prompt, temp=0.0, reset=True)
        llama.reset()  # no prefix is reused
        for _, token in zip(range(request["num_tokens"]), stream, strict=False):
            recorder.add_step([(0, [int(token)])])
        llama.detokenize(recorder.token_ids[0])
        return recorder.result()

    return {"version": llama_cpp.__version__, "dtype": "as in the GGUF", "threads": settings["num_threads"]}, measure


if __name__ == "__main__":
    serve(load)
