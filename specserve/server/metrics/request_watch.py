"""What is measured of requests as their answers pass: latencies, tokens, and how they end. Names are vLLM's.

Each sequence counts, and each text that is pooled, as each of vLLM's engine requests does. `model_name` is the base
model's name and `engine` 0, again as vLLM has them; `model` is the name that was asked for, an adapter's or the base
model's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from ...messages import Delta, Usage
from ...pooling_messages import Pooled
from .families import INTER_TOKEN_BUCKETS, REQUEST_BUCKETS, TOKEN_BUCKETS, TTFT_BUCKETS, Families, observe_each

LABELS = ("model_name", "engine")


class RequestFamilies:
    """Of one server, whose base model has this name."""

    def __init__(self, families: Families, base_name: str):
        self.base_name = base_name
        of_model = (*LABELS, "model")
        self.ttft = families.histogram(
            "time_to_first_token_seconds", "from admission to the first token", TTFT_BUCKETS, *of_model
        )
        self.inter_token = families.histogram(
            "inter_token_latency_seconds", "mean gap of a delta's tokens", INTER_TOKEN_BUCKETS, *of_model
        )
        self.e2e = families.histogram(
            "e2e_request_latency_seconds",
            "from admission to the last token, or the values of a text",
            REQUEST_BUCKETS,
            *of_model,
        )
        self.prompt_tokens = families.counter("prompt_tokens", "prompt tokens, cached ones included", *of_model)
        self.generation_tokens = families.counter("generation_tokens", "tokens generated", *of_model)
        self.time_per_token = families.histogram(
            "request_time_per_output_token_seconds",
            "of a sequence, mean after its first token",
            INTER_TOKEN_BUCKETS,
            *LABELS,
        )
        self.queue_time = families.histogram(
            "request_queue_time_seconds", "of a sequence, before it ran", REQUEST_BUCKETS, *LABELS
        )
        self.request_prompt_tokens = families.histogram(
            "request_prompt_tokens", "prompt tokens of a sequence", TOKEN_BUCKETS, *LABELS
        )
        self.request_generation_tokens = families.histogram(
            "request_generation_tokens", "tokens generated of a sequence", TOKEN_BUCKETS, *LABELS
        )
        self.success = families.counter(
            "request_success",
            "sequences and texts by how they ended; abort: the client left, error: they failed or were refused",
            *LABELS,
            "finished_reason",
        )
        for reason in ("stop", "length", "abort", "error"):
            self.success.labels(base_name, "0", reason)


class Watch:
    """One request, whose sequences have prompts of these lengths; unless it `is_timed` no histogram has its times."""

    def __init__(self, families: RequestFamilies, model: str, prompt_lens: Sequence[int], is_timed: bool = True):
        self._families = families
        self._is_timed = is_timed
        self._prompt_lens = prompt_lens
        self._start = time.monotonic()
        num = len(prompt_lens)
        self._first: list[float | None] = [None] * num
        self._last = [0.0] * num
        self._num_open = num
        self._has_failed = False
        self._labels = labels = (families.base_name, "0", model)
        self._inter_token = families.inter_token.labels(*labels)  # looked up once: there is a delta for each token
        self._generation_tokens = families.generation_tokens.labels(*labels)

    def delta(self, idx: int, delta: Delta) -> None:
        now, num = time.monotonic(), len(delta.token_ids)
        if self._first[idx] is None:
            self._first[idx] = now
            if self._is_timed:
                self._families.ttft.labels(*self._labels).observe(now - self._start)
            self._families.prompt_tokens.labels(*self._labels).inc(self._prompt_lens[idx])
        elif num and self._is_timed:
            # Tokens of one verification arrive together; each is charged its share of the gap.
            observe_each(self._inter_token, (now - self._last[idx]) / num, num)
        self._last[idx] = now
        self._generation_tokens.inc(num)
        if delta.finish_reason is not None:
            self._num_open -= 1
            self._finished(delta.finish_reason)
            if delta.usage is not None:
                self._ended(now, self._first[idx] or now, delta.usage)

    def pooled(self, idx: int, pooled: Pooled) -> None:
        self._num_open -= 1
        self._finished("stop")
        self._families.prompt_tokens.labels(*self._labels).inc(self._prompt_lens[idx])
        self._whole(time.monotonic(), pooled.queue_s, pooled.prompt_tokens)

    def failed(self) -> None:
        """What has not ended yet ends with an error."""
        self._has_failed = True

    def done(self) -> None:
        for _ in range(self._num_open):
            self._finished("error" if self._has_failed else "abort")
        self._num_open = 0

    def _finished(self, reason: str) -> None:
        self._families.success.labels(*self._labels[:2], reason).inc()

    def _ended(self, now: float, first: float, usage: Usage) -> None:
        families, labels = self._families, self._labels[:2]
        self._whole(now, usage.queue_s, usage.prompt_tokens)
        families.request_generation_tokens.labels(*labels).observe(usage.completion_tokens)
        if usage.completion_tokens > 1 and self._is_timed:
            families.time_per_token.labels(*labels).observe((now - first) / (usage.completion_tokens - 1))

    def _whole(self, now: float, queue_s: float, prompt_tokens: int) -> None:
        families, labels = self._families, self._labels[:2]
        if self._is_timed:
            families.e2e.labels(*self._labels).observe(now - self._start)
            families.queue_time.labels(*labels).observe(queue_s)
        families.request_prompt_tokens.labels(*labels).observe(prompt_tokens)
