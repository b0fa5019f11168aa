"""One client request as engine requests: prepared, run, and merged into one stream.

A `Job` is what was asked for, checked and tokenised; `run` yields (choice index, delta) as they come from any of its
sequences, measures latencies, and aborts everything that still runs when the client or a timeout ends it early.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec

from . import validation
from .adapter_store import AdapterStore
from .api_types import ChatRequest, CompletionRequest, GenerationFields
from .config import ServeConfig
from .engine_client import EngineClient
from .errors import UserError
from .messages import Delta, GenerateRequest, Usage
from .metrics import Metrics
from .structured_output import grammar_spec
from .tokenizer import TextTokenizer


@dataclass(slots=True)
class Job:
    """A checked request; sequence i belongs to prompt i // n, and the best `num_choices` of a prompt are answered."""

    id: str
    model: str  # as the client named it
    adapter: str | None
    request: CompletionRequest | ChatRequest
    tokenizer: TextTokenizer
    prompts: list[tuple[str | None, list[int]]]
    n: int
    num_choices: int
    requests: list[GenerateRequest]
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_chat(self) -> bool:
        return isinstance(self.request, ChatRequest)


class Generator:
    """Turns request bodies into jobs and jobs into deltas, for one engine."""

    def __init__(
        self,
        config: ServeConfig,
        engine: EngineClient,
        store: AdapterStore,
        tokenizer: TextTokenizer,
        model_name: str,
        metrics: Metrics,
    ):
        self.config = config
        self.engine = engine
        self.store = store
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.metrics = metrics
        self._adapter_tokenizers: dict[str, TextTokenizer] = {}  # by content hash

    def adapter_name(self, model: str | None, adapter_id: str | None) -> str | None:
        """The adapter that a request names through `model` or `adapter_id`; None is the base model."""
        named = None if model in (None, "", self.model_name) else model
        if adapter_id in (None, "", self.model_name):
            return named
        if named is not None and named != adapter_id:
            raise UserError(
                f"model names the adapter {named[:128]!r} and adapter_id {adapter_id!r}; name one", param="adapter_id"
            )
        return adapter_id

    async def tokenizer_for(self, adapter: str | None) -> tuple[TextTokenizer, str | None]:
        """The tokenizer to use, and the content hash of the loaded adapter; loads the adapter if needed."""
        if adapter is None:
            return self.tokenizer, None
        info = await self.store.resolve(adapter)
        if not info.has_tokenizer:
            return self.tokenizer, info.content_hash
        tokenizer = self._adapter_tokenizers.get(info.content_hash)
        if tokenizer is None:
            tokenizer = await asyncio.to_thread(self.tokenizer.for_adapter, self.store.path(adapter))
            self._adapter_tokenizers[info.content_hash] = tokenizer
        return tokenizer, info.content_hash

    async def prepare(self, request: CompletionRequest | ChatRequest) -> Job:
        """Check and tokenise a request. Raises `UserError`."""
        validation.check_supported(request)
        grammar = await asyncio.to_thread(grammar_spec, request)
        info = self.engine.info
        adapter = self.adapter_name(request.model, request.adapter_id)
        tokenizer, content_hash = await self.tokenizer_for(adapter)
        if isinstance(request, ChatRequest):
            messages = validation.chat_messages(request.messages)
            ids = await asyncio.to_thread(tokenizer.encode_chat, messages, *validation.chat_ending(request))
            prompts: list[tuple[str | None, list[int]]] = [(None, ids)]
        else:
            prompts = await asyncio.to_thread(validation.completion_prompts, request.prompt, tokenizer)
        for _, ids in prompts:
            validation.check_prompt_ids(ids, info)
        num_choices, n = validation.num_choices(request, len(prompts))
        sampling = validation.sampling_params(request, self.config, info, [len(ids) for _, ids in prompts])
        if n > num_choices and sampling.logprobs is None:
            sampling = msgspec.structs.replace(sampling, logprobs=0)  # what ranks them
        speculation = validation.speculation(request, self.config)
        job_id = f"{'chatcmpl' if isinstance(request, ChatRequest) else 'cmpl'}-{uuid.uuid4().hex}"
        prediction = await self._prediction(request, tokenizer)
        requests = [
            GenerateRequest(
                request_id=f"{job_id}-{idx}",
                prompt_token_ids=prompts[idx // n][1],
                sampling=sampling,
                adapter_hash=content_hash,
                cache_salt=request.cache_salt or "",
                sample_idx=idx % n,
                speculation=speculation,
                prediction_token_ids=prediction,
                grammar=grammar,
            )
            for idx in range(n * len(prompts))
        ]
        name = request.model or adapter or self.model_name
        return Job(job_id, name, adapter, request, tokenizer, prompts, n, num_choices, requests)

    async def _prediction(self, request: GenerationFields, tokenizer: TextTokenizer) -> list[int]:
        if request.prediction is None:
            return []
        text = validation.joined(request.prediction.content)
        ids = await asyncio.to_thread(tokenizer.encode_literal, text)
        return ids[: self.engine.info.max_model_len]

    async def run(self, job: Job) -> AsyncGenerator[tuple[int, Delta]]:
        """Deltas of all choices as they come. Raises `UserError`; leaving the iterator aborts what still runs."""
        queue: asyncio.Queue[tuple[int, Delta | BaseException]] = asyncio.Queue(maxsize=64)

        async def pump(idx: int, request: GenerateRequest) -> None:
            try:
                async with aclosing(self._one(job, request)) as deltas:
                    async for delta in deltas:
                        await queue.put((idx, delta))
            except Exception as error:
                await queue.put((idx, error))

        tasks = [asyncio.create_task(pump(idx, request)) for idx, request in enumerate(job.requests)]
        watch = self.metrics.watch(job.adapter or self.model_name, num_sequences=len(tasks))
        num_running = len(tasks)
        try:
            async with asyncio.timeout(self.config.request_timeout_s):
                while num_running:
                    idx, item = await queue.get()
                    if isinstance(item, BaseException):
                        raise item
                    num_running -= item.finish_reason is not None
                    watch.delta(idx, item)
                    yield idx, item
        except TimeoutError:
            raise UserError(
                f"the request took longer than {self.config.request_timeout_s:g} s (--request-timeout-s)",
                status=504,
                code="timeout",
            ) from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            watch.done()

    async def _one(self, job: Job, request: GenerateRequest) -> AsyncGenerator[Delta]:
        """One sequence; when its adapter was evicted meanwhile, it is loaded again, once."""
        for attempt in range(2):
            try:
                async with aclosing(self.engine.generate(request)) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except UserError as error:
                if error.code != "adapter_not_resident" or job.adapter is None or attempt:
                    raise
            self.store.forget(job.adapter)
            info = await self.store.resolve(job.adapter)
            request = msgspec.structs.replace(request, adapter_hash=info.content_hash)


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
