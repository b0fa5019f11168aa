"""Counts of finished sequences as the `usage` object of a response, and as what speculation did for it."""

from __future__ import annotations

from ...messages import Usage


def usage_of(usages: list[Usage], num_prompts: int, n: int) -> dict[str, object]:
    """The `usage` object of a response; each prompt counts once, however many choices it has."""
    prompt_tokens = sum(usages[idx * n].prompt_tokens for idx in range(num_prompts))
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usages[idx * n].cached_tokens for idx in range(num_prompts))},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(usage.accepted_prediction_tokens for usage in usages),
            "rejected_prediction_tokens": sum(usage.rejected_prediction_tokens for usage in usages),
        },
    }


def speculation_stats(usages: list[Usage]) -> dict[str, object]:
    """What speculation did for a request: asked for with `return_speculation_stats`."""
    forwards = sum(usage.num_forwards for usage in usages)
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    sources: dict[str, int] = {}
    for usage in usages:
        for source, num in usage.accepted_by_source.items():
            sources[source] = sources.get(source, 0) + num
    return {
        "num_forwards": forwards,
        "draft_tokens": sum(usage.draft_tokens for usage in usages),
        "accepted_draft_tokens": sum(usage.accepted_draft_tokens for usage in usages),
        "mean_accepted_length": round(completion_tokens / forwards, 4) if forwards else 0.0,
        "accepted_by_source": sources,
    }
