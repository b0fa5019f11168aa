"""What the log says of work at level info: a line for each request, and one for all of them while there are any.

Owns the lines' content: ids, names, counts and times, nothing of what was asked or answered.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from ..messages import (
    Delta,
    Usage,
)
from ..pooling_messages import Pooled
from ..stats_messages import EngineStats

logger = logging.getLogger(__name__)
SUMMARY_EVERY_S = 10.0


class RequestLine:
    """The line of one request; `failed` with a reason, or `ended` however it has ended.

    `prompt_lens` has the prompt of each sequence. `generates`: or its sequences are texts that are pooled.
    """

    def __init__(
        self, request_id: str, model: str, prompt_lens: Sequence[int], key: str | None, generates: bool = True
    ):
        self._name = f"{request_id}: {model!r}" + (f" for {key!r}" if key is not None else "")
        self._num_sequences, self._num_prompt_tokens = len(prompt_lens), sum(prompt_lens)
        self._start = time.monotonic()
        self._first_s: float | None = None
        self._generates = generates
        self._num_generated = 0
        self._usages: list[Usage] = []
        self._pooled: list[Pooled] = []
        self._finishes: list[str] = []
        self._outcome = "given up by the client"

    def delta(self, delta: Delta) -> None:
        if self._first_s is None:
            self._first_s = time.monotonic() - self._start
        self._num_generated += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._finishes.append(delta.finish_reason)
        if delta.usage is not None:
            self._usages.append(delta.usage)
        if len(self._finishes) == self._num_sequences:
            self._outcome = "+".join(sorted(set(self._finishes)))

    def pooled(self, pooled: Pooled) -> None:
        self._pooled.append(pooled)
        if len(self._pooled) == self._num_sequences:
            self._outcome = "pooled"

    def failed(self, reason: str) -> None:
        self._outcome = reason

    def ended(self) -> None:
        ended = self._usages if self._generates else self._pooled
        cached = sum(each.cached_tokens for each in ended)
        if not self._generates:
            logger.info(
                "%s: %s, %d of %d texts, %d tokens (%d cached), all in %.3f s",
                *(self._name, self._outcome, len(self._pooled), self._num_sequences, self._num_prompt_tokens, cached),
                time.monotonic() - self._start,
            )
            return
        accepted = sum(usage.accepted_draft_tokens for usage in self._usages)
        first = "none" if self._first_s is None else f"{self._first_s:.3f} s"
        logger.info(
            "%s: %s, %d prompt tokens (%d cached), %d generated (%d from drafts), first after %s, all in %.3f s",
            *(self._name, self._outcome, self._num_prompt_tokens, cached, self._num_generated, accepted),
            *(first, time.monotonic() - self._start),
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
