"""Helpers that run an `Engine` in the test's own process."""

from __future__ import annotations

from dataclasses import dataclass, field

from specserve.config import EngineConfig
from specserve.engine import Engine
from specserve.messages import Delta, GenerateRequest, RequestFailed, SamplingParams, Speculation, TokenLogprobs, Usage


@dataclass
class Result:
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    error: RequestFailed | None = None


def make_engine(model_dir, **overrides) -> Engine:
    settings = {"device": "cpu", "dtype": "fp32", "kv_cache_gib": 0.02, "max_num_seqs": 16, "max_batched_tokens": 64}
    return Engine(EngineConfig(model=str(model_dir), **settings | overrides), model_dir)


def request(request_id, prompt, *, adapter=None, mode="auto", max_draft_tokens=8, prediction=(), salt="", **sampling):
    sampling.setdefault("max_tokens", 16)
    sampling.setdefault("temperature", 0.0)
    return GenerateRequest(
        str(request_id),
        list(prompt),
        SamplingParams(**sampling),
        adapter_hash=adapter,
        cache_salt=salt,
        speculation=Speculation(mode, max_draft_tokens),
        prediction_token_ids=list(prediction),
    )


def collect(results: dict[str, Result], events) -> None:
    for event in events:
        result = results.setdefault(event.request_id, Result())
        if isinstance(event, RequestFailed):
            result.error = event
            continue
        assert isinstance(event, Delta)
        result.tokens += event.token_ids
        result.text += event.text
        result.logprobs += event.logprobs or []
        result.prompt_logprobs = event.prompt_logprobs or result.prompt_logprobs
        result.finish_reason, result.stop_reason, result.usage = event.finish_reason, event.stop_reason, event.usage


def run(engine: Engine, requests, *, stagger: int = 0) -> dict[str, Result]:
    """Generate for all requests, one more joining every `stagger` steps; checks that everything is given back."""
    results: dict[str, Result] = {}
    pending = list(requests)
    while pending or engine.has_work():
        for _ in range(1 if stagger else len(pending)):
            if pending:
                engine.add_request(pending.pop(0))
        for _ in range(max(1, stagger)):
            collect(results, engine.step())
    check_baseline(engine)
    return results


def check_baseline(engine: Engine) -> None:
    stats = engine.stats()
    assert stats.integrity_error is None, stats.integrity_error
    assert stats.num_free_kv_blocks == stats.num_kv_blocks
    assert stats.num_adapter_refs == 0 and stats.num_running == 0 and stats.num_waiting == 0


def tokens_of(results: dict[str, Result]) -> dict[str, list[int]]:
    for name, result in results.items():
        assert result.error is None, f"{name}: {result.error}"
    return {name: result.tokens for name, result in results.items()}
