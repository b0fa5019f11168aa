"""One choice whose tools' arguments are written by other adapters than its own: several sequences as one stream.

The first sequence runs with the request's adapter and ends at the colon before the first call's arguments, or without a
call. Each further one has the tokens so far as its prompt, runs with the called tool's adapter and ends with the answer
or at the next call's colon. Adapters share no KV, so a switch computes the conversation anew unless it is cached.
Invariant: the deltas are those of one sequence; exactly the last has a finish reason and the usage of all.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from ...messages import Delta, GenerateRequest, TokenTrace, Usage, renumbered
from .plan import ToolPlan

Start = Callable[[GenerateRequest, str | None], AsyncGenerator[Delta]]  # runs a sequence with an adapter by name
_SEED_STEP = 0x9E3779B97F4A7C15  # sequences of one choice draw different numbers


async def switching_deltas(
    plan: ToolPlan, request: GenerateRequest, own_adapter: str | None, eos_token_ids: frozenset[int], start: Start
) -> AsyncGenerator[Delta]:
    """The deltas of `request` with its tools' adapters. `start` resolves an adapter's name and runs a sequence."""
    adapter, tokens, text = own_adapter, list(request.prompt_token_ids), ""
    usage: Usage | None = None
    phase = request
    for num in range(1, request.sampling.max_tokens + 2):
        last: Delta | None = None
        async with aclosing(start(phase, adapter)) as deltas:
            async for delta in deltas:
                text += delta.text
                tokens += delta.token_ids
                if delta.finish_reason is not None:
                    last = delta
                    break
                trace = _numbered_on(delta.trace, usage)
                yield msgspec.structs.replace(delta, request_id=request.request_id, trace=trace)
        assert last is not None and last.usage is not None
        last_usage = last.usage
        tool = plan.announced(text) if last.finish_reason == "stop" and last.stop_reason is None else None
        num_end = 1 if tool is not None and tokens[-1:] and tokens[-1] in eos_token_ids else 0
        del tokens[len(tokens) - num_end :]
        last = msgspec.structs.replace(last, trace=_numbered_on(last.trace, usage))
        usage = _joined(usage, last_usage, num_end)
        left = len(request.prompt_token_ids) + request.sampling.max_tokens - len(tokens)
        if tool is None or left <= 0:
            finish = "length" if tool is not None else last.finish_reason
            yield _without_end(last, num_end, request.request_id, finish, usage)
            return
        yield _without_end(last, num_end, request.request_id, None, None)
        seed = (request.sampling.seed + num * _SEED_STEP) % 2**64
        sampling = msgspec.structs.replace(request.sampling, max_tokens=left, min_tokens=0, seed=seed)
        phase = msgspec.structs.replace(
            request,
            request_id=f"{request.request_id}-{num}",
            prompt_token_ids=list(tokens),
            sampling=sampling,
            grammar=plan.arguments_spec(tool),
            together=None,
            is_first=False,  # the answer has begun
        )
        adapter = tool.adapter or own_adapter


def _without_end(delta: Delta, num_end: int, request_id: str, finish: object, usage: Usage | None) -> Delta:
    """A sequence's last delta as one within the stream, without the token that ended it."""
    kept = len(delta.token_ids) - num_end
    return msgspec.structs.replace(
        delta,
        request_id=request_id,
        token_ids=delta.token_ids[:kept],
        logprobs=None if delta.logprobs is None else delta.logprobs[:kept],
        trace=None if delta.trace is None else delta.trace[: len(delta.trace) - num_end],
        finish_reason=finish,
        usage=usage,
    )


def _numbered_on(trace: list[TokenTrace] | None, before: Usage | None) -> list[TokenTrace] | None:
    """A trace whose forwards follow those of the sequences before."""
    return trace if trace is None or before is None else renumbered(trace, before.num_forwards)


def _joined(before: Usage | None, usage: Usage, num_end: int) -> Usage:
    """Counts of both; the prompt is the first's, and what it had cached."""
    tokens = usage.completion_tokens - num_end
    if before is None:
        return msgspec.structs.replace(usage, completion_tokens=tokens)
    by_source = {
        name: before.accepted_by_source.get(name, 0) + usage.accepted_by_source.get(name, 0)
        for name in {**before.accepted_by_source, **usage.accepted_by_source}
    }
    summed = ("num_forwards", "draft_tokens", "accepted_draft_tokens")
    predicted = ("accepted_prediction_tokens", "rejected_prediction_tokens")
    sums = {name: getattr(before, name) + getattr(usage, name) for name in (*summed, *predicted)}
    return msgspec.structs.replace(
        before, completion_tokens=before.completion_tokens + tokens, accepted_by_source=by_source, **sums
    )
