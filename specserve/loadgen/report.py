"""Records of requests to figures: latencies, throughput, errors, acceptance by adapter.

Owns the definitions, which docs/load_testing.md repeats. Latencies are of requests that succeeded; one that failed is
in `errors` and nowhere else.

A drafting server sends several tokens at once. `inter_chunk_ms` is what a reader sees: each gap between two arrivals,
once. `inter_token_ms` charges every token with its share of the gap that it arrived after: gap / tokens, once a token.
The tokens of the first chunk are part of the time to first token and charged to no gap.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from ..text_tables import text_table
from .client import Record

GOODPUT_KEYS = ("ttft", "tpot", "e2el")  # vLLM's names


class Distribution(msgspec.Struct, frozen=True):
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


class AdapterFigures(msgspec.Struct, frozen=True):
    """One adapter's share of a level; the last four only from servers that return speculation statistics."""

    num_requests: int
    num_ok: int
    output_tokens: int
    ttft_ms: Distribution | None
    end_to_end_ms: Distribution | None
    num_forwards: int | None = None
    draft_tokens: int | None = None
    acceptance: float | None = None  # drafts that held / drafts that were verified
    mean_accepted_length: float | None = None  # output tokens a forward


class LevelFigures(msgspec.Struct, frozen=True):
    """One rate or one concurrency."""

    rate_offered: float | None  # requests/s asked for; None in a closed loop
    rate_scheduled: float | None  # what the draw of arrivals came to
    concurrency: int | None
    num_requests: int
    num_ok: int
    errors: dict[str, int]
    error_examples: dict[str, str]
    duration_s: float  # from the start of the level to the last answer
    rate_achieved: float  # succeeded requests / duration
    output_tokens: int
    output_tokens_per_s: float
    prompt_tokens: int
    num_without_usage: int  # their tokens are counted by chunks, which is too few where a chunk holds several
    tokens_per_chunk: float | None
    ttft_ms: Distribution | None
    inter_token_ms: Distribution | None
    inter_chunk_ms: Distribution | None
    end_to_end_ms: Distribution | None
    send_lag_ms: Distribution | None  # scheduled to sent: the load generator's own delay
    adapters: dict[str, AdapterFigures]
    goodput: float | None = None  # requests/s that succeeded and met all targets; None without targets
    good_share: float | None = None  # of all requests, those that failed among them


def level_figures(
    records: Sequence[Record], rate: float | None, concurrency: int | None, targets_ms: Mapping[str, float] = {}
) -> LevelFigures:
    """Figures of a level; `targets_ms` are latencies by `GOODPUT_KEYS` that a good request does not exceed."""
    ok = [record for record in records if record.error is None]
    failed = [record for record in records if record.error is not None]
    duration_s = max((record.end_s for record in records), default=0.0)
    last_s = max((record.scheduled_s for record in records), default=0.0)
    output_tokens = sum(num_output_tokens(record) for record in ok)
    chunk_tokens = [(record, tokens_by_chunk(record)) for record in ok]
    gaps, shares, weights = [], [], []
    for record, tokens in chunk_tokens:
        for previous, chunk, num_tokens in zip(record.chunks, record.chunks[1:], tokens[1:], strict=False):
            gap_ms = 1e3 * (chunk.at_s - previous.at_s)
            gaps.append(gap_ms)
            if num_tokens > 0:
                shares.append(gap_ms / num_tokens)
                weights.append(num_tokens)
    num_good = sum(is_good(record, targets_ms) for record in ok)
    num_chunks = sum(len(record.chunks) for record in ok)
    return LevelFigures(
        rate_offered=rate,
        rate_scheduled=_ratio(len(records), last_s) if rate is not None else None,
        concurrency=concurrency,
        num_requests=len(records),
        num_ok=len(ok),
        errors=dict(Counter(record.error or "" for record in failed)),
        error_examples={record.error or "": record.error_text[:300] for record in reversed(failed)},
        duration_s=round(duration_s, 3),
        rate_achieved=_ratio(len(ok), duration_s) or 0.0,
        output_tokens=output_tokens,
        output_tokens_per_s=_ratio(output_tokens, duration_s) or 0.0,
        prompt_tokens=sum(record.usage.prompt_tokens for record in ok if record.usage),
        num_without_usage=sum(record.usage is None for record in ok),
        tokens_per_chunk=_ratio(output_tokens, num_chunks),
        ttft_ms=distribution(first_token_ms(ok)),
        inter_token_ms=distribution(shares, weights),
        inter_chunk_ms=distribution(gaps),
        end_to_end_ms=distribution(end_to_end_ms(ok)),
        send_lag_ms=distribution([1e3 * (record.sent_s - record.scheduled_s) for record in records]),
        adapters={
            model: adapter_figures([record for record in records if record.model == model])
            for model in sorted({record.model for record in records})
        },
        goodput=(_ratio(num_good, duration_s) or 0.0) if targets_ms else None,
        good_share=_ratio(num_good, len(records)) if targets_ms else None,
    )


def is_good(record: Record, targets_ms: Mapping[str, float]) -> bool:
    """Whether a request that succeeded kept to all targets. One without output has no first token and is none."""
    if not record.chunks:
        return False
    first_s, last_s = record.chunks[0].at_s, record.chunks[-1].at_s
    figures_ms = {
        "ttft": 1e3 * (first_s - record.scheduled_s),
        "tpot": 1e3 * (last_s - first_s) / max(1, num_output_tokens(record) - 1),
        "e2el": 1e3 * (record.end_s - record.scheduled_s),
    }
    return all(figures_ms[name] <= most for name, most in targets_ms.items())


def adapter_figures(records: Sequence[Record]) -> AdapterFigures:
    ok = [record for record in records if record.error is None]
    stats = [
        (num_output_tokens(record), record.usage.speculation)
        for record in ok
        if record.usage is not None and record.usage.speculation is not None
    ]
    speculation: dict[str, Any] = {}
    if stats:
        num_forwards = sum(stat.num_forwards for _, stat in stats)
        draft_tokens = sum(stat.draft_tokens for _, stat in stats)
        speculation = {
            "num_forwards": num_forwards,
            "draft_tokens": draft_tokens,
            "acceptance": _ratio(sum(stat.accepted_draft_tokens for _, stat in stats), draft_tokens),
            "mean_accepted_length": _ratio(sum(tokens for tokens, _ in stats), num_forwards),
        }
    return AdapterFigures(
        num_requests=len(records),
        num_ok=len(ok),
        output_tokens=sum(num_output_tokens(record) for record in ok),
        ttft_ms=distribution(first_token_ms(ok)),
        end_to_end_ms=distribution(end_to_end_ms(ok)),
        **speculation,
    )


def first_token_ms(records: Sequence[Record]) -> list[float]:
    """Requests that gave no output have no first token."""
    return [1e3 * (record.chunks[0].at_s - record.scheduled_s) for record in records if record.chunks]


def end_to_end_ms(records: Sequence[Record]) -> list[float]:
    return [1e3 * (record.end_s - record.scheduled_s) for record in records]


def num_output_tokens(record: Record) -> int:
    return record.usage.completion_tokens if record.usage is not None else len(record.chunks)


def tokens_by_chunk(record: Record) -> list[float]:
    """Tokens of each chunk: as the server's log-probabilities count them, else all tokens shared out by characters."""
    if record.chunks and all(chunk.num_tokens is not None for chunk in record.chunks):
        return [float(chunk.num_tokens or 0) for chunk in record.chunks]
    num_chars = sum(chunk.num_chars for chunk in record.chunks)
    return [num_output_tokens(record) * chunk.num_chars / num_chars for chunk in record.chunks] if num_chars else []


def distribution(values: Sequence[float], weights: Sequence[float] | None = None) -> Distribution | None:
    """None of no values. A percentile is a value that occurred; `weights` say how often each did."""
    if not values:
        return None
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99), weights=weights, method="inverted_cdf")
    figures = (np.average(values, weights=weights), p50, p90, p99, max(values))
    return Distribution(*(round(float(figure), 3) for figure in figures))


def _ratio(count: float, whole: float) -> float | None:
    return round(count / whole, 4) if whole and math.isfinite(whole) else None


def table(levels: Sequence[LevelFigures]) -> str:
    """One line a level for the terminal."""
    closed = levels[0].concurrency is not None
    head = ["parallel" if closed else "rate", "achieved", "tokens/s", "ok", "failed"]
    if levels[0].goodput is not None:
        head += ["goodput"]
    head += ["TTFT p50", "p90", "p99", "token p50", "p99", "chunk p50", "p99", "total p50", "p90", "p99"]
    rows = [head]
    for level in levels:
        row = [
            f"{level.concurrency if closed else level.rate_offered:g}",
            f"{level.rate_achieved:.2f}",
            f"{level.output_tokens_per_s:.1f}",
            str(level.num_ok),
            str(level.num_requests - level.num_ok),
        ]
        if level.goodput is not None:
            row.append(f"{level.goodput:.2f}")
        for figures, names in (
            (level.ttft_ms, ("p50", "p90", "p99")),
            (level.inter_token_ms, ("p50", "p99")),
            (level.inter_chunk_ms, ("p50", "p99")),
            (level.end_to_end_ms, ("p50", "p90", "p99")),
        ):
            row += ["-" if figures is None else f"{getattr(figures, name):.0f}" for name in names]
        rows.append(row)
    return text_table(rows)


def adapter_table(level: LevelFigures) -> str:
    """Acceptance by adapter, for levels whose server returned it; empty otherwise."""
    rows = [
        f"  {name}: {figures.num_ok} of {figures.num_requests} ok, {figures.mean_accepted_length or 0:.2f} tokens a "
        f"forward, {100 * (figures.acceptance or 0):.0f}% of {figures.draft_tokens} drafts held"
        for name, figures in level.adapters.items()
        if figures.num_forwards is not None
    ]
    return "\n".join(rows)
