"""An engine with its adapters and tokenizers, as one event loop of this process sees it: the server without HTTP.

Requests are checked, tokenised and run by the server's own code, so that a prompt gets the same tokens from both. Owns
how many of a call's prompts are in the engine at a time and what becomes of the others when one fails. The program is
trusted: an adapter may lie anywhere, unless `adapter_roots` says otherwise.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from ..adapter_messages import AdapterInfo
from ..config import ServeConfig
from ..errors import UserError
from ..server.access.keys import KeyRing
from ..server.adapter_store import AdapterStore
from ..server.generation.generator import Generator
from ..server.generation.job import Job
from ..server.http_body import convert
from ..server.metrics.metrics import Metrics
from ..server.openai.request_types import ChatRequest, CompletionRequest
from ..server.openai.responses import ResponseBuilder
from ..server.served_engine import engine_of, model_name_of
from ..server.stats.snapshot import StatsSource
from ..server.stats.types import StatsResponse
from ..text.known_tokens import check_tokenizer
from ..text.tokenizer import TextTokenizer
from .all_or_none import all_or_none
from .outputs import OutputBuilder, RequestOutput
from .params import LoRARequest, SamplingParams, check_texts
from .pooled import PooledCalls

# Of one call: enough for the largest step and a queue behind it, and no more token ids in memory than that.
MAX_AT_ONCE = 512

Adapter = str | Path | LoRARequest


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt or conversation, as fields of a body beside those of `params`."""

    body: dict[str, Any]
    params: SamplingParams
    adapter: Adapter | None

    @property
    def is_chat(self) -> bool:
        return "messages" in self.body


class Service:
    """Made, started and used on one event loop. `model_dir` is a local directory."""

    def __init__(self, config: ServeConfig, model_dir: Path):
        roots = [Path(folder).resolve() for folder in config.adapter_roots]
        if roots and config.adapters_dir is not None:
            roots.append(Path(config.adapters_dir).resolve())
        self.engine = engine_of(config, model_dir, roots)
        self.model_name = model_name_of(config, model_dir)
        self.store = AdapterStore(
            self.engine, config.adapters_dir, self.model_name, roots=roots or [Path(model_dir.anchor)]
        )
        self.engine.on_adapters_left = self.store.adapters_left
        self._stats = StatsSource(self.engine, self.model_name)
        self._config = config
        self._model_dir = model_dir
        self.caller = KeyRing(config).anonymous
        self._generator: Generator | None = None
        self._given: dict[str, Path] = {}  # names that requests have brought directories for
        self._giving = asyncio.Lock()

    async def start(self) -> None:
        """Load the model. Raises `UserError` that says why it cannot be served."""
        try:
            _, tokenizer = await asyncio.gather(self.engine.start(), asyncio.to_thread(TextTokenizer, self._model_dir))
            check_tokenizer(tokenizer, self.engine.info.vocab_size)
        except BaseException:
            await self.engine.stop()
            raise
        self._generator = Generator(self._config, self.engine, self.store, tokenizer, self.model_name, Metrics())

    async def close(self) -> None:
        await self.engine.stop()
        if self._generator is not None:
            await self._generator.close()

    @property
    def generator(self) -> Generator:
        assert self._generator is not None, "not started"
        return self._generator

    async def pool(
        self,
        task: Literal["embed", "classify", "score"],
        sides: Sequence[Any],
        adapter: Adapter | None,
        fields: Mapping[str, Any],
        on_done: Callable[[int], object] = lambda num: None,
    ) -> list[Any]:
        """`PoolingOutput` of each text or pair; `sides` are one or two arguments of it. Raises `UserError`."""
        calls, name = PooledCalls(self.generator, self.caller), await self.name_of(adapter)
        return await getattr(calls, task)(*sides, name, fields, on_done)

    async def stats(self) -> StatsResponse:
        return await self._stats.fresh()

    # -- adapters

    async def adapter_names(self) -> list[str]:
        return await self.store.look(self.store.names)

    async def load_adapter(self, name: str, path: str, replace: bool = False) -> AdapterInfo:
        """Give `name` to the directory `path`. Raises `UserError`; a name that is taken is refused unless `replace`."""
        directory = Path(os.path.abspath(Path(path).expanduser()))
        async with self._giving:
            self._given.pop(name, None)
            info = await self.store.register(name, str(directory), replace=replace)
            self._given[name] = directory
            return info

    async def unload_adapter(self, name: str) -> None:
        async with self._giving:
            self._given.pop(name, None)
            await self.store.unregister(name)

    async def name_of(self, adapter: Adapter | None) -> str | None:
        """The name that serves `adapter`, which is given to its directory first where it brings one."""
        if isinstance(adapter, str) and (os.sep in adapter or adapter in (os.curdir, os.pardir)):
            adapter = Path(adapter)
        if isinstance(adapter, Path):
            directory = Path(os.path.abspath(adapter.expanduser()))
            adapter = LoRARequest(directory.name, lora_path=str(directory))
        if adapter is None or isinstance(adapter, str):
            return adapter
        if not adapter.lora_path:
            return adapter.lora_name
        directory = Path(os.path.abspath(Path(adapter.lora_path).expanduser()))
        async with self._giving:
            if self._given.get(adapter.lora_name) != directory:
                await self.store.register(adapter.lora_name, str(directory), replace=adapter.load_inplace)
                self._given[adapter.lora_name] = directory
        return adapter.lora_name

    # -- requests

    async def run(self, asks: Sequence[Ask], on_done: Callable[[], object]) -> list[RequestOutput]:
        """The outputs of all, in their order. The first that fails ends all others; its error notes which it was."""
        results: list[RequestOutput | None] = [None] * len(asks)
        todo = iter(enumerate(asks))

        async def work() -> None:
            for idx, ask in todo:
                try:
                    results[idx] = await self._whole(ask)
                except UserError as error:
                    if len(asks) > 1:
                        error.add_note(f"this was prompt {idx} of {len(asks)}, counted from 0")
                    raise
                on_done()

        await all_or_none(work() for _ in range(min(len(asks), max(MAX_AT_ONCE, 2 * self.engine.info.max_num_seqs))))
        return [result for result in results if result is not None]

    async def _whole(self, ask: Ask) -> RequestOutput:
        job = await self._job(ask)
        builder = OutputBuilder(job, ask.params.logprobs is not None)
        async with aclosing(self.generator.deltas(job)) as deltas:
            async for idx, delta in deltas:
                builder.add(idx, delta)
        return builder.whole()

    async def stream(self, ask: Ask) -> AsyncGenerator[RequestOutput]:
        """What there is after each delta. Raises `UserError`; leaving it early ends the request."""
        job = await self._job(ask)
        builder = OutputBuilder(job, ask.params.logprobs is not None)
        async with aclosing(self.generator.deltas(job)) as deltas:
            async for idx, delta in deltas:
                yield builder.streamed(idx, delta)

    async def chunks(self, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any]]:
        """The answer to a body of /v1/chat/completions, as the chunks of its stream. Raises `UserError`."""
        check_texts(body)
        job = await self.generator.prepare(convert({**body, "stream": True}, ChatRequest), self.caller)
        builder = ResponseBuilder(job)
        async with aclosing(self.generator.deltas(job)) as deltas:
            async for idx, delta in deltas:
                for chunk in builder.events(idx, delta):
                    yield chunk
        for chunk in builder.closing():
            yield chunk

    async def _job(self, ask: Ask) -> Job:
        body = {"model": await self.name_of(ask.adapter), **ask.body, **ask.params.body(ask.is_chat)}
        check_texts(body)
        request: ChatRequest | CompletionRequest
        request = convert(body, ChatRequest) if ask.is_chat else convert(body, CompletionRequest)
        job = await self.generator.prepare(request, self.caller)
        changes: dict[str, Any] = {}
        if ask.params.prompt_logprobs is not None:
            changes["prompt_logprobs"] = ask.params.prompt_logprobs
        if ask.params.max_tokens is None and not ask.is_chat:
            changes |= self._to_the_end(job, ask.params.min_tokens)
        if changes:
            sampling = msgspec.structs.replace(job.requests[0].sampling, **changes)
            job.requests = [msgspec.structs.replace(request, sampling=sampling) for request in job.requests]
        return job

    def _to_the_end(self, job: Job, min_tokens: int) -> dict[str, int]:
        room = self.engine.info.max_model_len - len(job.requests[0].prompt_token_ids)
        if not 0 <= min_tokens <= room:
            raise UserError(f"min_tokens is {min_tokens}; 0 to {room} is allowed", param="min_tokens")
        return {"max_tokens": room, "min_tokens": min_tokens}
