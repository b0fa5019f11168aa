"""From a job to its deltas: all its sequences as one stream, measured and logged, ended with the client or the time.

Writes the texts of sequences that have no stop strings; the engine, which ends the others by their texts, writes those.
Tools' adapters take turns in one sequence (`chat.tools.adapter_switching`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from ...adapter_messages import AdapterInfo
from ...chat.tools.adapter_switching import switching_deltas
from ...messages import Delta, GenerateRequest
from ...text.detokenizer import Detokenizer
from ...text.tokenizer import TextTokenizer
from ...text.traced_text import TracedText
from ..adapter_store import AdapterStore
from ..engine_client.resending import EngineLosses
from ..engine_client.serving_engine import ServingEngine
from .account import Accounts
from .end_time import EndTime
from .job import Job
from .sequences import Sequences


class JobRunner:
    """Runs the jobs of one server on its engine."""

    def __init__(
        self,
        engine: ServingEngine,
        store: AdapterStore,
        tokenizer: TextTokenizer,
        sequences: Sequences,
        accounts: Accounts,
    ):
        self._engine = engine
        self._store = store
        self._sequences = sequences
        self._tokenizer = tokenizer  # the base model's writes all texts, as the engine does
        self._accounts = accounts

    async def deltas(self, job: Job) -> AsyncGenerator[tuple[int, Delta]]:
        """Deltas of all choices as they come. Raises `UserError`; leaving the iterator aborts what still runs."""
        with self._accounts.of(job) as account, EndTime(account.end) as end:
            async with aclosing(self._choices(job)) as deltas:
                while (item := await end.next_of(deltas)) is not None:
                    if end.has_come and item[1].finish_reason is None:
                        raise TimeoutError
                    account.delta(*item)
                    yield item

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
        """One sequence with its texts and its trace's; `prompted` as in `Sequences.generate`."""
        sampling = request.sampling
        detokenizer: Detokenizer | None = None
        if not sampling.detokenize:
            detokenizer = self._tokenizer.detokenizer(request.prompt_token_ids, sampling.skip_special_tokens)
        traced: TracedText | None = None
        if request.speculation.trace:
            reader = self._tokenizer.detokenizer(request.prompt_token_ids, sampling.skip_special_tokens)
            traced = TracedText(reader)
        async with aclosing(self._sequences.generate(request, adapter, prompted, losses)) as deltas:
            async for delta in deltas:
                if detokenizer is not None:
                    delta = _with_text(delta, detokenizer)
                yield delta if traced is None else traced.told(delta)


def _with_text(delta: Delta, detokenizer: Detokenizer) -> Delta:
    text = detokenizer.write(delta.token_ids, delta.num_silent, is_last=delta.finish_reason is not None)
    return msgspec.structs.replace(delta, text=text)
