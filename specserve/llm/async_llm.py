"""`specserve.AsyncLLM`: `LLM` for programs with an event loop, and on any loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ..adapter_messages import AdapterInfo
from ..server.stats.types import StatsResponse
from .asks import Message, Prompt, adapter_of, chat_asks, completion_asks, one_adapter_of
from .front import Adapters, Front, Params, single
from .outputs import RequestOutput
from .params import SamplingParams
from .pooled import ClassificationOutput, EmbeddingOutput, PoolingOutput, ScoringOutput
from .service import Adapter, Ask


class AsyncLLM(Front):
    """`LLM` for programs with an event loop: the same options and calls, awaited, on any loop and on several.

    Nothing is loaded before `await start()` or `async with`. Cancelling what waits for an answer ends its requests.
    """

    async def start(self) -> AsyncLLM:
        """Load the model. Raises `UserError` that says why it cannot be served."""
        await asyncio.to_thread(self._start)
        return self

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        adapter: Adapters = None,
        lora_request: Adapters = None,
    ) -> list[RequestOutput]:
        """As `LLM.generate`."""
        asks = completion_asks(prompts, sampling_params, adapter_of(adapter, lora_request))
        return await self._acall(lambda service: service.run(asks, lambda: None))

    async def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        adapter: Adapters = None,
        lora_request: Adapters = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """As `LLM.chat`."""
        asks = chat_asks(messages, sampling_params, adapter_of(adapter, lora_request), fields)
        return await self._acall(lambda service: service.run(asks, lambda: None))

    async def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        adapter: Adapter | None = None,
        lora_request: Adapter | None = None,
        **fields: Any,
    ) -> list[PoolingOutput[EmbeddingOutput]]:
        """As `LLM.embed`."""
        given = one_adapter_of(adapter, lora_request)
        return await self._acall(lambda service: service.pool("embed", (prompts,), given, fields))

    async def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        adapter: Adapter | None = None,
        lora_request: Adapter | None = None,
        **fields: Any,
    ) -> list[PoolingOutput[ClassificationOutput]]:
        """As `LLM.classify`."""
        given = one_adapter_of(adapter, lora_request)
        return await self._acall(lambda service: service.pool("classify", (prompts,), given, fields))

    async def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        adapter: Adapter | None = None,
        lora_request: Adapter | None = None,
        **fields: Any,
    ) -> list[PoolingOutput[ScoringOutput]]:
        """As `LLM.score`."""
        given = one_adapter_of(adapter, lora_request)
        return await self._acall(lambda service: service.pool("score", (data_1, data_2), given, fields))

    def generate_stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: Adapter | None = None,
        lora_request: Adapter | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """As `LLM.generate_stream`, for `async for`."""
        return self._stream(single(completion_asks(prompt, sampling_params, adapter_of(adapter, lora_request))))

    def chat_stream(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        adapter: Adapter | None = None,
        lora_request: Adapter | None = None,
        **fields: Any,
    ) -> AsyncIterator[RequestOutput]:
        """As `LLM.chat_stream`, for `async for`."""
        return self._stream(single(chat_asks(messages, sampling_params, adapter_of(adapter, lora_request), fields)))

    def _stream(self, ask: Ask) -> AsyncIterator[RequestOutput]:
        service, thread = self._running()
        return thread.aiterate(service.stream(ask))

    async def adapter_names(self) -> list[str]:
        return await self._acall(lambda service: service.adapter_names())

    async def load_adapter(self, name: str, path: str | os.PathLike[str], *, replace: bool = False) -> AdapterInfo:
        """As `LLM.load_adapter`."""
        return await self._acall(lambda service: service.load_adapter(name, os.fspath(path), replace))

    async def unload_adapter(self, name: str) -> None:
        await self._acall(lambda service: service.unload_adapter(name))

    async def stats(self) -> StatsResponse:
        return await self._acall(lambda service: service.stats())

    async def close(self) -> None:
        """As `LLM.close`."""
        await asyncio.to_thread(self._end)

    async def __aenter__(self) -> AsyncLLM:
        return await self.start()

    async def __aexit__(self, *exception: object) -> None:
        await self.close()
