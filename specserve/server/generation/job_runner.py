"""From a job to its deltas: all its sequences as one stream, measured and logged, ended with the client or the time.

Writes the texts of sequences that have no stop strings; the engine, which ends the others by their texts, writes those.
Owns what may happen to a sequence on its way: its tools' adapters take turns (`chat.tools.adapter_switching`), its
adapter had to make room and is loaded again, its engine process ended (`engine_client.resending`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from ...chat.tools.adapter_switching import switching_deltas
from ...errors import DeadlineError, OverloadedError, UserError
from ...messages import AdapterInfo, Delta, GenerateRequest
from ...text.detokenizer import Detokenizer
from ...text.tokenizer import TextTokenizer
from ...text.traced_text import TracedText
from ..activity_log import RequestLine
from ..adapter_store import AdapterStore
from ..engine_client.client import EngineClient
from ..engine_client.resending import EngineLosses, Resender, other_output
from ..metrics.metrics import Metrics
from ..spans import Span, Spans
from .job import Job
from .prompts import check_same_texts
from .token_charge import TokenCharge

MAX_RELOADS = 16  # of one sequence's adapter, where many wait for few places


class JobRunner:
    """Runs the jobs of one server on its engine; none may take longer than `timeout_s`."""

    def __init__(
        self,
        engine: EngineClient,
        store: AdapterStore,
        tokenizer: TextTokenizer,
        base_name: str,
        metrics: Metrics,
        timeout_s: float,
        spans: Spans | None = None,
    ):
        self._spans = spans
        self._engine = engine
        self._resender = Resender(engine)
        self._store = store
        self._tokenizer = tokenizer  # the base model's writes all texts, as the engine does
        self._base_name = base_name
        self._metrics = metrics
        self._timeout_s = timeout_s

    async def deltas(self, job: Job) -> AsyncGenerator[tuple[int, Delta]]:
        """Deltas of all choices as they come. Raises `UserError`; leaving the iterator aborts what still runs."""
        num, timeout_s = len(job.requests), self._timeout_s
        if job.deadline is not None:
            timeout_s = min(timeout_s, job.deadline - time.monotonic())
        end = asyncio.get_running_loop().time() + timeout_s
        prompt_lens = [len(request.prompt_token_ids) for request in job.requests]
        watch = self._metrics.watch(job.adapter or self._base_name, prompt_lens)
        line = RequestLine(job.id, job.adapter or self._base_name, num, job.caller.key)
        charge = TokenCharge(job)
        span: Span | None = None
        failure: str | None = None
        try:
            if self._spans is not None:
                span = self._spans.begin(job)
            if job.adapter is not None:
                self._store.uses.count(job.adapter)
            async with aclosing(self._choices(job)) as deltas:
                while (item := await _next(deltas, end)) is not None:
                    idx, delta = item
                    watch.delta(idx, delta)
                    line.delta(delta)
                    charge.delta(delta)
                    if span is not None:
                        span.delta(delta)
                    yield idx, delta
        except UserError as error:
            watch.failed()
            failure = error.code or error.type
            line.failed(failure)
            charge.failed()
            raise
        except TimeoutError:
            watch.failed()
            failure = "timeout"
            line.failed(failure)
            if timeout_s < self._timeout_s:
                raise DeadlineError("deadline_ms passed before the answer was complete", param="deadline_ms") from None
            raise UserError(
                f"the request took longer than {self._timeout_s:g} s (--request-timeout-s)",
                status=504,
                code="timeout",
            ) from None
        except Exception:
            watch.failed()
            failure = "internal_error"
            line.failed(failure)
            charge.failed()
            raise
        finally:
            watch.done()
            line.ended()
            if span is not None:
                span.ended(failure)
            num_used = charge.settle()
            self._metrics.key_tokens.labels(self._metrics.key_label(job.caller.name)).inc(num_used)

    async def _choices(self, job: Job) -> AsyncGenerator[tuple[int, Delta]]:
        """The deltas of all choices as they come."""
        if len(job.requests) == 1:
            async with aclosing(self._choice(job, job.requests[0])) as deltas:
                async for delta in deltas:
                    yield 0, delta
            return
        queue: asyncio.Queue[tuple[int, Delta | BaseException]] = asyncio.Queue(maxsize=64)

        async def pump(idx: int, request: GenerateRequest) -> None:
            try:
                async with aclosing(self._choice(job, request)) as deltas:
                    async for delta in deltas:
                        await queue.put((idx, delta))
            except Exception as error:
                await queue.put((idx, error))

        tasks = [asyncio.create_task(pump(idx, request)) for idx, request in enumerate(job.requests)]
        num_running = len(tasks)
        try:
            while num_running:
                idx, item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                num_running -= item.finish_reason is not None
                yield idx, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _choice(self, job: Job, request: GenerateRequest) -> AsyncGenerator[Delta]:
        """One sequence, or several as one where tools bring adapters."""
        if job.tools is None or not job.tools.switching:
            return self._one(request, job.adapter, job.adapter_info, EngineLosses(is_once=bool(job.request.stream)))
        eos_token_ids = frozenset(self._engine.info.eos_token_ids)
        return switching_deltas(job.tools, request, job.adapter, eos_token_ids, self._one_with)

    async def _one_with(self, request: GenerateRequest, adapter: str | None) -> AsyncGenerator[Delta]:
        """One sequence with the adapter of that name, whatever `request` holds."""
        content_hash = None if adapter is None else (await self._store.resolve(adapter, request.priority)).content_hash
        request = msgspec.structs.replace(request, adapter_hash=content_hash)
        async with aclosing(self._one(request, adapter, None, EngineLosses(is_once=True))) as deltas:
            async for delta in deltas:
                yield delta

    async def _one(
        self, request: GenerateRequest, adapter: str | None, prompted: AdapterInfo | None, losses: EngineLosses
    ) -> AsyncGenerator[Delta]:
        """One sequence; when its adapter had to make room meanwhile, or went with its engine, it is loaded again.

        `prompted` is the adapter whose chat template and tokenizer made the prompt, if it did: they must be the same.
        """
        sampling = request.sampling
        detokenizer: Detokenizer | None = None
        if not sampling.detokenize:
            detokenizer = self._tokenizer.detokenizer(request.prompt_token_ids, sampling.skip_special_tokens)
        traced: TracedText | None = None
        if request.speculation.trace:
            reader = self._tokenizer.detokenizer(request.prompt_token_ids, sampling.skip_special_tokens)
            traced = TracedText(reader)
        for attempt in range(MAX_RELOADS + 1):
            try:
                async with aclosing(self._resender.generate(request, losses)) as deltas:
                    async for delta in deltas:
                        if detokenizer is not None:
                            delta = _with_text(delta, detokenizer)
                        yield delta if traced is None else traced.told(delta)
                return
            except UserError as error:
                if error.code != "adapter_not_resident" or adapter is None:
                    raise
                if attempt == MAX_RELOADS:
                    raise OverloadedError(
                        f"adapter {adapter!r} had to make room for others {attempt + 1} times before this request ran; "
                        "retry later or raise --max-adapters",
                        status=503,
                    ) from None
            self._store.engine_lost(adapter, request.adapter_hash)
            now = await self._store.resolve(adapter, request.priority)
            check_same_texts(adapter, prompted, now)
            if losses.token_ids and now.content_hash != request.adapter_hash:
                raise other_output()
            request = msgspec.structs.replace(request, adapter_hash=now.content_hash)


def _with_text(delta: Delta, detokenizer: Detokenizer) -> Delta:
    text = detokenizer.write(delta.token_ids, delta.num_silent, is_last=delta.finish_reason is not None)
    return msgspec.structs.replace(delta, text=text)


async def _next(deltas: AsyncGenerator[tuple[int, Delta]], end: float) -> tuple[int, Delta] | None:
    """The next one, if there is one. Raises `TimeoutError` after `end`, of the event loop's time, while more follow.

    The timeout is not open while a delta is written, which it would cut in the middle.
    """
    async with asyncio.timeout_at(end):
        item = await anext(deltas, None)
    if item is not None and item[1].finish_reason is None and asyncio.get_running_loop().time() > end:
        raise TimeoutError
    return item
