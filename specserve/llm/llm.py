"""`specserve.LLM` and `specserve.AsyncLLM`: generation from Python, without a server, as with vLLM's classes.

The model runs in an engine process of its own, the one that serves; here is a thread that talks to it (`service` on a
`loop_thread`). So a notebook stays responsive, nothing of the program is run twice and needs a `__main__` guard, and no
torch is imported. Several in one program share nothing but the machine.
"""

from __future__ import annotations

import asyncio
import os
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ..config import ServeConfig
from ..errors import EngineDeadError, UserError
from ..messages import AdapterInfo, EngineInfo
from ..model.store import resolve_model
from ..server.stats.types import StatsResponse
from ..text.tokenizer import TextTokenizer
from .asks import Message, Prompt, adapter_of, chat_asks, completion_asks
from .loop_thread import LoopThread
from .options import config_of
from .outputs import RequestOutput
from .params import SamplingParams
from .service import Adapter, Ask, Service

T = TypeVar("T")
Params = SamplingParams | Sequence[SamplingParams] | None
Adapters = Adapter | Sequence[Adapter | None] | None


class _Front:
    """What both classes are: an engine that is started once and closed once."""

    def __init__(self, model: str | os.PathLike[str] | None = None, **options: Any):
        self._config = config_of(model, options)
        self._thread: LoopThread | None = None
        self._service: Service | None = None
        self._pid = os.getpid()
        self._closed = False

    def _start(self) -> None:
        """Load the model, which takes seconds. Raises `UserError` that says why it cannot be served."""
        if self._service is not None or self._closed:
            return
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # cores are the engine's
        if self._config.adapters_dir is not None and not Path(self._config.adapters_dir).is_dir():
            raise UserError(
                f"adapters_dir {self._config.adapters_dir!r} is not a directory; create it or leave it out",
                param="adapters_dir",
            )
        model_dir = resolve_model(self._config.model, self._config.revision, progress=sys.stderr.isatty())
        thread = LoopThread(f"specserve {model_dir.name}")
        try:
            service = thread.call(_started(self._config, model_dir))
        except BaseException:
            thread.stop()
            raise
        self._thread, self._service = thread, service
        # Also at the end of the program, while threads still run.
        self._finalizer = weakref.finalize(self, _close, service, thread, self._pid)

    def _end(self) -> None:
        self._closed = True
        if self._service is not None:
            self._finalizer()

    def _running(self) -> tuple[Service, LoopThread]:
        if self._pid != os.getpid():
            raise EngineDeadError("this LLM belongs to the process that made it; make another one here")
        if self._closed or self._service is None or self._thread is None:
            raise EngineDeadError("this LLM is closed" if self._closed else "this LLM has not been started")
        return self._service, self._thread

    def _call(self, work: Callable[[Service], Coroutine[Any, Any, T]]) -> T:
        service, thread = self._running()
        return thread.call(work(service))

    async def _acall(self, work: Callable[[Service], Coroutine[Any, Any, T]]) -> T:
        service, thread = self._running()
        return await thread.acall(work(service))

    @property
    def model_name(self) -> str:
        """The base model's name."""
        return self._running()[0].model_name

    @property
    def engine_info(self) -> EngineInfo:
        """What the engine serves: model, device, dtype, context, KV blocks."""
        return self._running()[0].engine.info

    def get_tokenizer(self) -> TextTokenizer:
        """The base model's, as prompts are read with it: `encode(text)`, `decode(ids)`."""
        return self._running()[0].generator.prompts.tokenizer


class LLM(_Front):
    """A base model with its adapters, for this program.

    `model` is a Hugging Face directory, a .gguf file or a hub id, None the default model; every folder in
    `adapters_dir` is an adapter of that name. Other options are the engine's settings (`specserve serve --help`), such
    as `dtype="bf16"` or `kv_cache_gib=4`. Raises `UserError` where that cannot be served. Use it in a `with` block, or
    `close()` it; the end of the program closes it too. Threads may share it.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **options: Any):
        super().__init__(model, **options)
        self._start()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        adapter: Adapters = None,
        lora_request: Adapters = None,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt: a text, token ids, or a dict with prompt or prompt_token_ids; one or a list.

        `sampling_params` and `adapter` are one for all, or a list with one for each. `use_tqdm` None shows progress of
        several prompts on a terminal. Raises `UserError` for the first that cannot be done; Ctrl-C ends all.
        """
        return self._run(completion_asks(prompts, sampling_params, adapter_of(adapter, lora_request)), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        adapter: Adapters = None,
        lora_request: Adapters = None,
        use_tqdm: bool | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list of them; without `sampling_params`, to the answer's end.

        `fields` are others of a chat's body: tools, tool_choice, chat_template_kwargs, add_generation_prompt,
        continue_final_message, reasoning_effort.
        """
        return self._run(chat_asks(messages, sampling_params, adapter_of(adapter, lora_request), fields), use_tqdm)

    def generate_stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: Adapter | None = None,
        lora_request: Adapter | None = None,
    ) -> Iterator[RequestOutput]:
        """What there is of one prompt's outputs, each time that more came; leaving the iterator ends the request."""
        return self._stream(_single(completion_asks(prompt, sampling_params, adapter_of(adapter, lora_request))))

    def chat_stream(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        adapter: Adapter | None = None,
        lora_request: Adapter | None = None,
        **fields: Any,
    ) -> Iterator[RequestOutput]:
        """The same of one conversation's answer."""
        return self._stream(_single(chat_asks(messages, sampling_params, adapter_of(adapter, lora_request), fields)))

    def chat_chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The answer to a body of POST /v1/chat/completions, as the chunks of its stream; `model` names the adapter."""
        service, thread = self._running()
        return thread.iterate(service.chunks(body))

    def _run(self, asks: list[Ask], use_tqdm: bool | None) -> list[RequestOutput]:
        if use_tqdm is None:
            use_tqdm = len(asks) > 1 and sys.stderr.isatty()
        if not use_tqdm:
            return self._call(lambda service: service.run(asks, lambda: None))
        from tqdm import tqdm

        with tqdm(total=len(asks), desc="prompts", unit="", dynamic_ncols=True) as bar:
            return self._call(lambda service: service.run(asks, bar.update))

    def _stream(self, ask: Ask) -> Iterator[RequestOutput]:
        service, thread = self._running()
        return thread.iterate(service.stream(ask))

    def adapter_names(self) -> list[str]:
        """The adapters that can be named now."""
        return self._call(lambda service: service.adapter_names())

    def load_adapter(self, name: str, path: str | os.PathLike[str], *, replace: bool = False) -> AdapterInfo:
        """Load the directory `path` under `name`. Raises `UserError`, also for a taken name unless `replace`."""
        return self._call(lambda service: service.load_adapter(name, os.fspath(path), replace))

    def unload_adapter(self, name: str) -> None:
        """Take the name away."""
        self._call(lambda service: service.unload_adapter(name))

    def stats(self) -> StatsResponse:
        """What the engine does and has done, as GET /v1/stats says it."""
        return self._call(lambda service: service.stats())

    def close(self) -> None:
        """End the engine; what runs in other threads ends with `EngineDeadError`. Once more does nothing."""
        self._end()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class AsyncLLM(_Front):
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

    def generate_stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: Adapter | None = None,
        lora_request: Adapter | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """As `LLM.generate_stream`, for `async for`."""
        return self._stream(_single(completion_asks(prompt, sampling_params, adapter_of(adapter, lora_request))))

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
        return self._stream(_single(chat_asks(messages, sampling_params, adapter_of(adapter, lora_request), fields)))

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


async def _started(config: ServeConfig, model_dir: Path) -> Service:
    service = Service(config, model_dir)
    await service.start()
    return service


def _close(service: Service, thread: LoopThread, pid: int) -> None:
    """Where garbage is collected on the thread itself, the engine is told and not waited for.

    A fork of process `pid` has a copy of all this without the thread, and the engine is not its own to end.
    """
    if os.getpid() != pid:
        return
    if thread.is_current:
        closing = thread.submit(service.close())
        closing.add_done_callback(lambda done: thread.stop())
        return
    with suppress(Exception):
        thread.call(service.close())
    thread.stop()


def _single(asks: list[Ask]) -> Ask:
    if len(asks) != 1:
        raise UserError(
            f"{len(asks)} prompts cannot be streamed as one; stream each on its own (AsyncLLM runs them side by side)",
            param="prompt",
        )
    return asks[0]
