"""What is measured, logged, traced and charged of a request while it runs, and its time; however it ends.

One account a request, for whatever the engine does for it. Owns what an end means: an error of the user's, the time
that is over, a fault of ours, or a client that left.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from ...errors import DeadlineError, UserError
from ...messages import Delta
from ...pooling_messages import Pooled
from ..access.caller import Caller
from ..activity_log import log_request
from ..adapter_store import AdapterStore
from ..job_counts import JobCounts
from ..metrics.metrics import Metrics
from ..metrics.request_watch import Watch
from ..spans import Span, Spans, Traced
from .token_charge import TokenCharge


class Accountable(Traced, Protocol):
    """A request that is about to run."""

    @property
    def adapter(self) -> str | None: ...
    @property
    def caller(self) -> Caller: ...
    @property
    def deadline(self) -> float | None: ...  # of time.monotonic()
    @property
    def prompt_lens(self) -> Sequence[int]: ...  # of its sequences
    @property
    def num_may_generate(self) -> int: ...  # tokens, as its key's limits count them


class Account:
    """Of one request, which all its answers pass through."""

    def __init__(self, end: float, watch: Watch, counts: JobCounts, charge: TokenCharge):
        self.end = end  # of the event loop's time: it may not take longer
        self.counts = counts
        self._watch, self._charge = watch, charge
        self._span: Span | None = None

    def delta(self, idx: int, delta: Delta) -> None:
        self._watch.delta(idx, delta)
        self.counts.delta(delta)
        self._charge.delta(delta)

    def pooled(self, idx: int, pooled: Pooled) -> None:
        self._watch.pooled(idx, pooled)
        self.counts.pooled.append(pooled)

    def begin(self, span: Span | None) -> None:
        self._span = span

    def failed(self, is_free: bool) -> None:
        """`is_free`: what it has cost is nobody's, unless it gave tokens."""
        self._watch.failed()
        if is_free:
            self._charge.failed()

    def ended(self, failure: str | None) -> int:
        """The tokens that were charged."""
        self._watch.done()
        if self._span is not None:
            self._span.ended(self.counts, failure)
        return self._charge.settle()


class Accounts:
    """Of the requests of one server, of which none that somebody waits for may take longer than `timeout_s`."""

    def __init__(
        self, store: AdapterStore, base_name: str, metrics: Metrics, timeout_s: float, spans: Spans | None = None
    ):
        self._store = store
        self._base_name = base_name
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._spans = spans

    @contextmanager
    def of(self, job: Accountable) -> Iterator[Account]:
        """The account of a request that runs within. A `TimeoutError` is that its time is over, and so answered.

        Raises `RateLimitedError` where its key has not the tokens.
        """
        limit_s = math.inf if job.caller.is_background else self._timeout_s  # what waits for all others may take long
        timeout_s, model, lens = limit_s, job.adapter or self._base_name, job.prompt_lens
        if job.deadline is not None:
            timeout_s = min(timeout_s, job.deadline - time.monotonic())
        watch = self._metrics.watch(model, lens, is_timed=not job.caller.is_background)
        charge = TokenCharge(job.caller.allowance, job.num_prompt_tokens, job.num_may_generate)
        account = Account(asyncio.get_running_loop().time() + timeout_s, watch, JobCounts(len(lens)), charge)
        failure: str | None = None
        try:
            if self._spans is not None:
                account.begin(self._spans.begin(job))
            if job.adapter is not None:
                self._store.uses.count(job.adapter)
            yield account
        except UserError as error:
            failure = error.code or error.type
            account.failed(is_free=True)
            raise
        except TimeoutError:
            failure = "timeout"
            account.failed(is_free=False)
            if timeout_s < limit_s:
                raise DeadlineError("deadline_ms passed before the answer was complete", param="deadline_ms") from None
            raise UserError(
                f"the request took longer than {self._timeout_s:g} s (--request-timeout-s)",
                status=504,
                code="timeout",
            ) from None
        except Exception:
            failure = "internal_error"
            account.failed(is_free=True)
            raise
        finally:
            num_used = account.ended(failure)
            log_request(job, model, job.caller.key, account.counts, failure)
            self._metrics.key_tokens.labels(self._metrics.key_label(job.caller.name)).inc(num_used)
