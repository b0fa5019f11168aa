"""Requests answered by an engine in this process, some at a time: their outputs, and the seconds of all of them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import click

from specserve.engine.engine import Engine
from specserve.messages import GenerateRequest, RequestFailed, TokenLogprobs, Usage


@dataclass(frozen=True, slots=True)
class Output:
    token_ids: list[int]
    text: str
    finish_reason: str | None
    usage: Usage
    prompt_logprobs: list[TokenLogprobs | None]  # none unless asked for


def generate(engine: Engine, requests: Sequence[GenerateRequest], batch: int) -> tuple[list[Output], float]:
    """Outputs in the order of `requests`, `batch` of which run at a time, and the seconds until the last token."""
    outputs: dict[str, Output] = {}
    tokens: dict[str, list[int]] = defaultdict(list)
    texts: dict[str, str] = defaultdict(str)
    logprobs: dict[str, list[TokenLogprobs | None]] = defaultdict(list)
    waiting = list(requests)[::-1]
    start = time.perf_counter()
    while len(outputs) < len(requests):
        while waiting and len(requests) - len(waiting) - len(outputs) < batch:
            engine.add_request(waiting.pop())
        for event in engine.step():
            if isinstance(event, RequestFailed):
                raise click.ClickException(event.error.message)
            key = event.request_id
            tokens[key] += event.token_ids
            texts[key] += event.text
            logprobs[key] += event.prompt_logprobs or []
            if event.usage is not None:
                outputs[key] = Output(tokens[key], texts[key], event.finish_reason, event.usage, logprobs[key])
    seconds = time.perf_counter() - start
    return [outputs[request.request_id] for request in requests], seconds
