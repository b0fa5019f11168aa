"""What the log says of work at level info: a line for each request, and one for all of them while there are any.

Owns the lines' content: ids, names, counts and times, nothing of what was asked or answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from ..stats_messages import EngineStats
from .job_counts import JobCounts
from .spans import Traced

logger = logging.getLogger(__name__)
SUMMARY_EVERY_S = 10.0


def log_request(job: Traced, model: str, key: str | None, counts: JobCounts, failure: str | None) -> None:
    """The line of a request that has ended; `failure`: why, if it has failed."""
    outcome = failure or "given up by the client"
    if failure is None and counts.is_whole:
        outcome = "+".join(sorted(set(counts.finishes))) or "pooled"
    name, num_prompt = f"{job.id}: {model!r}" + (f" for {key!r}" if key is not None else ""), sum(job.prompt_lens)
    if not job.generates:
        logger.info(
            "%s: %s, %d of %d texts, %d tokens (%d cached), all in %.3f s",
            *(name, outcome, len(counts.pooled), len(job.prompt_lens), num_prompt, counts.num_cached_tokens),
            counts.seconds,
        )
        return
    accepted = sum(usage.accepted_draft_tokens for usage in counts.usages)
    first = "none" if counts.first_s is None else f"{counts.first_s:.3f} s"
    logger.info(
        "%s: %s, %d prompt tokens (%d cached), %d generated (%d from drafts), first after %s, all in %.3f s",
        *(name, outcome, num_prompt, counts.num_cached_tokens, counts.num_generated, accepted),
        *(first, counts.seconds),
    )


async def summarize(stats: Callable[[], Awaitable[EngineStats | None]], every_s: float = SUMMARY_EVERY_S) -> None:
    """A line every `every_s` in which the engine had work, until cancelled."""
    before, then = await stats(), time.monotonic()
    while True:
        await asyncio.sleep(every_s)
        now, at = await stats(), time.monotonic()
        if now is not None and before is not None and (line := summary(before, now, at - then)):
            logger.info("%s", line)
        before, then = now, at


def summary(before: EngineStats, now: EngineStats, seconds: float) -> str | None:
    """What was done between two snapshots; None when that is nothing, or when the engine has been restarted between."""

    def grown(name: str) -> int:
        return int(getattr(now, name) - getattr(before, name))

    prompt, cached, generated = grown("prompt_tokens"), grown("cached_prompt_tokens"), grown("generated_tokens")
    drafts, accepted = grown("draft_tokens"), grown("accepted_draft_tokens")
    busy = now.num_running or now.num_waiting or prompt or generated
    if not busy or min(prompt, cached, generated, drafts, accepted) < 0:
        return None
    share = f"{100 * accepted / drafts:.0f}% of {drafts} drafts kept" if drafts else "no drafts"
    used = 100 * (1 - now.num_free_kv_blocks / now.num_kv_blocks)
    return (
        f"{now.num_running} running, {now.num_waiting} waiting; {prompt / seconds:.1f} prompt tokens/s ({cached} of "
        f"{prompt} cached), {generated / seconds:.1f} generated/s; {share}; KV cache {used:.1f}% in use"
    )
