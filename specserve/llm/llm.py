"""`specserve.LLM`: generation from Python, without a server, as with vLLM's class.

The model runs in an engine process of its own, the one that serves; here is a thread that talks to it (`service` on a
`loop_thread`). So a notebook stays responsive, nothing of the program is run twice and needs a `__main__` guard, and no
torch is imported. Several in one program share nothing but the machine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ..adapter_messages import AdapterInfo
from ..server.stats.types import StatsResponse
from .asks import Message, Prompt, adapter_of, chat_asks, completion_asks, one_adapter_of
from .front import Adapters, Front, Params, single
from .outputs import RequestOutput
from .params import SamplingParams
from .pooled import ClassificationOutput, EmbeddingOutput, PoolingOutput, ScoringOutput
from .service import Adapter, Ask


class LLM(Front):
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

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        adapter: Adapter | None = None,
        lora_request: Adapter | None = None,
        use_tqdm: bool | None = None,
        **fields: Any,
    ) -> list[PoolingOutput[EmbeddingOutput]]:
        """A vector of each text, by an adapter that embeds or by the base model; texts are given as prompts are.

        `fields` are others of the body of POST /v1/embeddings: dimensions, input_type, normalize, pooling,
        truncate_prompt_tokens, priority, cache_salt. Raises `UserError` for the first text that cannot be done.
        """
        return self._pool("embed", (prompts,), one_adapter_of(adapter, lora_request), fields, use_tqdm)

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        adapter: Adapter | None = None,
        lora_request: Adapter | None = None,
        use_tqdm: bool | None = None,
        **fields: Any,
    ) -> list[PoolingOutput[ClassificationOutput]]:
        """What an adapter that classifies says of each text: all its questions, from one pass.

        `fields` are others of the body of POST /classify.
        """
        return self._pool("classify", (prompts,), one_adapter_of(adapter, lora_request), fields, use_tqdm)

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        adapter: Adapter | None = None,
        lora_request: Adapter | None = None,
        use_tqdm: bool | None = None,
        **fields: Any,
    ) -> list[PoolingOutput[ScoringOutput]]:
        """How well each pair goes together, by an adapter that re-ranks or embeds; one `data_1` goes with all `data_2`.

        `fields` are others of the body of POST /score.
        """
        return self._pool("score", (data_1, data_2), one_adapter_of(adapter, lora_request), fields, use_tqdm)

    def generate_stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        adapter: Adapter | None = None,
        lora_request: Adapter | None = None,
    ) -> Iterator[RequestOutput]:
        """What there is of one prompt's outputs, each time that more came; leaving the iterator ends the request."""
        return self._stream(single(completion_asks(prompt, sampling_params, adapter_of(adapter, lora_request))))

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
        return self._stream(single(chat_asks(messages, sampling_params, adapter_of(adapter, lora_request), fields)))

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

    def _pool(
        self,
        task: Literal["embed", "classify", "score"],
        sides: Sequence[Any],
        adapter: Adapter | None,
        fields: Mapping[str, Any],
        use_tqdm: bool | None,
    ) -> list[Any]:
        if not (sys.stderr.isatty() if use_tqdm is None else use_tqdm):
            return self._call(lambda service: service.pool(task, sides, adapter, fields))
        from tqdm import tqdm

        total = len(sides[-1]) if isinstance(sides[-1], list | tuple) else None
        with tqdm(total=total, desc="texts", unit="", dynamic_ncols=True) as bar:
            return self._call(lambda service: service.pool(task, sides, adapter, fields, bar.update))

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
