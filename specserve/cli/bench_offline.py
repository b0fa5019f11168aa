"""`specserve bench offline`: how fast is the engine here, and do drafts pay?

Runs the engine in this process, with drafts and without in turn within each round, because a machine's speed drifts by
more between minutes than drafts gain; only figures of one run are comparable. The prompt asks for text that repeats a
part of the prompt, which prompt lookup can draft: it shows what drafts cost and gain, not what a task's users will see.
"""

import json
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from ..config import EngineConfig
from ..errors import UserError, from_info
from ..messages import Delta, GenerateRequest, RequestFailed, SamplingParams, Speculation
from ..model.store import resolve_model

if TYPE_CHECKING:
    from ..engine.engine import Engine

PASSAGE = (
    "The quick brown fox jumps over the lazy dog. The dog sleeps on the warm stones by the river and does not wake up. "
    "The fox goes back to the forest and waits for the evening. "
)


def offline(
    config: EngineConfig,
    batch_sizes: list[int],
    max_tokens: int,
    rounds: int,
    adapters_dir: Path | None = None,
    trace: Path | None = None,
) -> None:
    """Print tokens/s for every batch size with drafts off and on, then one JSON line.

    With `trace` the steps are profiled, by batch size and drafts, and the trace is written there.
    """
    from ..engine.engine import Engine
    from ..engine.step_profile import StepProfile
    from ..server.served_engine import with_base_head
    from ..text.special_tokens import load_backend_tokenizer

    model_dir = resolve_model(config.model, config.revision)
    engine = Engine(with_base_head(config), model_dir)
    prompt = load_backend_tokenizer(model_dir).encode(PASSAGE * 2 + PASSAGE[:20]).ids
    room = engine.info.max_model_len - max_tokens
    if room < 1:
        raise UserError(f"--max-tokens {max_tokens} fills the context of {engine.info.max_model_len} tokens; lower it")
    prompt = prompt[-room:]
    weight_bytes = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    bandwidth = memory_bandwidth(engine.info.device)
    limit = bandwidth / weight_bytes
    click.echo(
        f"limit: {weight_bytes / 1e9:.2f} GB of weights as stored, read once a step at {bandwidth / 1e9:.0f} GB/s: "
        f"{limit:.0f} steps/s"
    )
    modes = ["off"] if config.speculation == "off" else ["off", "auto"]
    hashes: list[str | None] = [None]
    if adapters_dir is not None:
        folders = sorted(file.parent for file in adapters_dir.glob("*/adapter_config.json"))
        if not folders:
            raise UserError(f"--adapters-dir {adapters_dir} holds no folder with an adapter_config.json")
        hashes = [engine.load_adapter(folder.name, folder).content_hash for folder in folders]
    profile = StepProfile(engine) if trace is not None else None
    profiles: dict[str, dict[str, Any]] = {}
    results: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for round_idx in range(rounds + 1):
        for size in batch_sizes:
            for mode in modes:
                if profile is not None:
                    profile.start()
                figures = _rates(engine, prompt, size, mode, hashes, config.max_draft_tokens, max_tokens, round_idx)
                if profile is not None and trace is not None and round_idx == rounds:
                    profiles[f"batch {size}, drafts {mode}"] = profile.summary()
                    click.echo(f"batch {size}, drafts {mode}\n{profile.table()}\n")
                    profile.write_trace(trace.with_stem(f"{trace.stem}-{size}-{mode}"))
                if round_idx > 0:  # the first round warms up
                    results.setdefault((size, mode), []).append(figures)
    click.echo(f"{'batch':>5}  {'drafts':<6}  {'tokens/s':>8}  {'tokens a step':>13}")
    lines = []
    for (size, mode), samples in results.items():
        rate = statistics.median(rate for rate, _ in samples)
        accepted_len = statistics.median(length for _, length in samples)
        click.echo(f"{size:>5}  {mode:<6}  {rate:>8.1f}  {accepted_len:>13.2f}")
        lines.append(
            {"batch": size, "drafts": mode, "tokens_per_s": round(rate, 2), "mean_len": round(accepted_len, 3)}
        )
    summary = {
        "bench": "offline",
        "version": __version__,
        "torch": metadata.version("torch"),
        "device": engine.info.device,
        "dtype": engine.info.dtype,
        "model": model_dir.name,
        "max_tokens": max_tokens,
        "rounds": rounds,
        "limit_steps_per_s": round(limit, 1),
        "adapters": len(hashes) if adapters_dir is not None else 0,
        "results": lines,
        **({"profiles": profiles} if profiles else {}),
    }
    click.echo(json.dumps(summary))


def memory_bandwidth(device: str) -> float:
    """Bytes per second that a sum over 256 MiB reads."""
    import torch

    data = torch.ones(64 * 2**20, dtype=torch.float32, device=device)
    best_s = float("inf")
    for _ in range(4):
        start_s = time.perf_counter()
        data.sum().item()  # sync: the measurement ends when the sum is there
        best_s = min(best_s, time.perf_counter() - start_s)
    return data.nbytes / best_s


def _rates(
    engine: "Engine",
    prompt: list[int],
    size: int,
    mode: str,
    hashes: list[str | None],
    max_draft_tokens: int,
    max_tokens: int,
    salt: int,
) -> tuple[float, float]:
    """(tokens per second, tokens per forward) of `size` equal requests started together; prefill is not counted."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    speculation = Speculation(mode="off" if mode == "off" else "auto", max_draft_tokens=max_draft_tokens)
    for i in range(size):
        engine.add_request(
            GenerateRequest(
                request_id=f"{salt}-{mode}-{i}",
                prompt_token_ids=prompt,
                sampling=sampling,
                adapter_hash=hashes[i % len(hashes)],
                cache_salt=f"{salt}-{mode}-{i}",  # every prompt is read, none comes from the prefix cache
                speculation=speculation,
            )
        )
    started: set[str] = set()
    start_s = None  # when the last request had its first token
    num_tokens = num_forwards = 0
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, RequestFailed):
                raise from_info(event.error)
            assert isinstance(event, Delta)  # nothing is pooled here
            if start_s is not None:
                num_tokens += len(event.token_ids)
            elif event.token_ids:
                started.add(event.request_id)
            if event.usage is not None:
                num_forwards += event.usage.num_forwards
        if start_s is None and len(started) == size:
            start_s = time.perf_counter()
    if start_s is None or not num_tokens:
        raise UserError("the output is too short to measure; raise --max-tokens")
    return num_tokens / (time.perf_counter() - start_s), size * max_tokens / num_forwards
