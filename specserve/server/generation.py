"""One client request as engine requests: prepared, run, and merged into one stream.

A `Job` is what was asked for, checked and tokenised; `run` yields (choice index, delta) as they come from any of its
sequences, measures latencies, and aborts everything that still runs when the client or a timeout ends it early.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec

from ..chat.messages import chat_ending, chat_messages, joined, template_variables
from ..chat.reasoning import THINK, THINK_END, Thinking, may_think
from ..chat.tools.definitions import Tool, ToolUse, all_tools, tool_use
from ..chat.tools.formats import choose_format
from ..chat.tools.grammar import Marks
from ..chat.tools.phases import run_switching
from ..chat.tools.plan import ToolPlan, direct_adapter, make_plan, markers
from ..chat.tools.prompt import for_template
from ..config import ServeConfig
from ..errors import OverloadedError, UserError
from ..grammar.structured_output import asks_for_grammar, grammar_spec
from ..messages import AdapterInfo, Delta, GenerateRequest
from ..text.template_renderer import RENDER_TIMEOUT_S, TemplateRenderer
from ..text.tokenizer import LONG_TEXT, HiddenChat, TextTokenizer
from .activity_log import RequestLine
from .adapter_store import AdapterStore
from .engine_client.client import EngineClient
from .engine_client.resending import Losses, Resender
from .metrics import Metrics
from .openai.conversion import (
    check_prompt_ids,
    check_supported,
    choice_counts,
    completion_prompts,
    sampling_params,
    speculation_params,
)
from .openai.types import ChatRequest, CompletionRequest, GenerationFields, TokenizeRequest

logger = logging.getLogger(__name__)
T = TypeVar("T")

MAX_TOKENIZERS = 64  # of adapters; others are read again
MAX_RELOADS = 16  # of one sequence's adapter, where many wait for few places


@dataclass(slots=True)
class Job:
    """A checked request; sequence i belongs to prompt i // n, and the best `num_choices` of a prompt are answered."""

    id: str
    model: str  # as the client named it
    adapter: str | None
    adapter_info: AdapterInfo | None  # of the adapter as it was when the prompt was made
    request: CompletionRequest | ChatRequest
    tokenizer: TextTokenizer
    prompts: list[tuple[str | None, list[int]]]
    n: int
    num_choices: int
    requests: list[GenerateRequest]
    tools: ToolPlan | None = None
    thinking: Thinking | None = None
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
        self._resender = Resender(engine)
        self.store = store
        self.tokenizer = tokenizer
        self.model_name = model_name
        self.metrics = metrics
        self.templates = TemplateRenderer()
        # One thread, not a lock: a reader goes on when its client leaves, and the next one must wait for that too.
        self._long_texts = ThreadPoolExecutor(max_workers=1, thread_name_prefix="long text")
        self._adapter_tokenizers: OrderedDict[str, TextTokenizer] = OrderedDict()  # by text hash, latest use last
        chosen = choose_format(tokenizer.chat_template, config.tool_format)
        logger.info("tool calls: %s format (%s)", chosen.format.name, chosen.reason)

    async def close(self, _: object = None) -> None:
        self._long_texts.shutdown(wait=False, cancel_futures=True)
        await self.templates.close()

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

    async def tokenizer_for(self, adapter: str | None) -> tuple[TextTokenizer, AdapterInfo | None]:
        """The tokenizer to use, and the loaded adapter; loads the adapter if needed."""
        if adapter is None:
            return self.tokenizer, None
        info, files = await self.store.resolve_with_texts(adapter, self._adapter_tokenizers)
        if info.text_hash is None:
            return self.tokenizer, info
        if files is not None:
            tokenizer = await asyncio.to_thread(self.tokenizer.for_adapter, adapter, files)
            tokenizer = self._adapter_tokenizers.setdefault(info.text_hash, tokenizer)
            if len(self._adapter_tokenizers) > MAX_TOKENIZERS:
                self._adapter_tokenizers.popitem(last=False)
        else:
            tokenizer = self._adapter_tokenizers[info.text_hash]
            self._adapter_tokenizers.move_to_end(info.text_hash)
        return tokenizer, info

    async def off_loop(self, num_chars: int, read: Callable[..., T], *args: object) -> T:
        """`read(*args)` on a thread; long texts one after the other: each takes 60 times its size while it is read."""
        if num_chars <= LONG_TEXT:
            return await asyncio.to_thread(read, *args)
        return await asyncio.get_running_loop().run_in_executor(self._long_texts, read, *args)

    async def prepare(self, request: CompletionRequest | ChatRequest) -> Job:
        """Check and tokenise a request. Raises `UserError`."""
        check_supported(request)
        grammar = await asyncio.to_thread(grammar_spec, request) if asks_for_grammar(request) else None
        info = self.engine.info
        use = tool_use(request) if isinstance(request, ChatRequest) else None
        if use is not None and grammar is not None:
            raise UserError(
                "an answer that may call tools has the tools' grammar; leave out response_format, structured_outputs "
                "and guided_*, or send tool_choice none",
                param="tools",
            )
        adapter = direct_adapter(use, self.adapter_name(request.model, request.adapter_id))
        await self._load_tool_adapters(use)
        tokenizer, adapter_info = await self.tokenizer_for(adapter)
        plan: ToolPlan | None = None
        thinking: Thinking | None = None
        if isinstance(request, ChatRequest):
            ids, plan = await self._chat(request, use, tokenizer, adapter)
            if grammar is None and (plan is None or plan.free_text):  # a grammar leaves no room for thoughts
                thinking = thinking_of(tokenizer, ids, plan)
            prompts: list[tuple[str | None, list[int]]] = [(None, ids)]
        else:
            size = text_len(request.prompt)
            special = request.add_special_tokens is not False
            prompts = await self.off_loop(size, completion_prompts, request.prompt, tokenizer, info, special)
        for _, ids in prompts:
            check_prompt_ids(ids, info)
        num_choices, n = choice_counts(request, len(prompts))
        sampling = sampling_params(request, info, [len(ids) for _, ids in prompts])
        if n > num_choices and sampling.logprobs is None:
            sampling = msgspec.structs.replace(sampling, logprobs=0)  # what ranks them
        if plan is not None:
            grammar = plan.grammar
            if tokenizer.is_special(plan.marks.ids.get(plan.format.marker, -1)):
                sampling = msgspec.structs.replace(sampling, skip_special_tokens=False)  # the parser must see it
        if thinking is not None and tokenizer.is_special(tokenizer.added_tokens({THINK_END})[0].get(THINK_END, -1)):
            sampling = msgspec.structs.replace(sampling, skip_special_tokens=False)
        speculation = speculation_params(request, self.config)
        job_id = f"{'chatcmpl' if isinstance(request, ChatRequest) else 'cmpl'}-{uuid.uuid4().hex}"
        prediction = await self._prediction(request, tokenizer)
        requests = [
            GenerateRequest(
                request_id=f"{job_id}-{idx}",
                prompt_token_ids=prompts[idx // n][1],
                sampling=sampling,
                adapter_hash=None if adapter_info is None else adapter_info.content_hash,
                cache_salt=request.cache_salt or "",
                sample_idx=idx % n,
                speculation=speculation,
                prediction_token_ids=prediction,
                grammar=grammar,
            )
            for idx in range(n * len(prompts))
        ]
        name = request.model or adapter or self.model_name
        return Job(
            *(job_id, name, adapter, adapter_info, request, tokenizer, prompts),
            *(n, num_choices, requests, plan, thinking),
        )

    async def chat_ids(
        self, request: ChatRequest | TokenizeRequest, tokenizer: TextTokenizer, tools: Sequence[Tool]
    ) -> list[int]:
        """The conversation's token ids; `tools` are described to the model. Raises `UserError`."""
        chosen = choose_format(tokenizer.chat_template, self.config.tool_format)

        def prepare() -> HiddenChat:
            messages, definitions = for_template(chat_messages(request.messages or []), tools, chosen)
            effort = request.reasoning_effort if isinstance(request, ChatRequest) else None
            variables = template_variables(request.chat_template_kwargs, effort)
            return tokenizer.hidden_chat(messages, *chat_ending(request), definitions, variables)

        return await self.rendered_ids(tokenizer, prepare, self.engine.info.max_model_len)

    async def rendered_ids(
        self, tokenizer: TextTokenizer, prepare: Callable[[], HiddenChat], max_tokens: int | None
    ) -> list[int]:
        """Token ids of a conversation, rendered where its template may do no harm."""
        chat = await asyncio.to_thread(prepare)
        if tokenizer.is_template_trusted:
            text = await asyncio.to_thread(tokenizer.render_chat, chat)
        else:
            text = await self.templates.render(tokenizer.template_job(chat, RENDER_TIMEOUT_S), tokenizer.template_name)
        return await self.off_loop(len(text) + chat.marks.num_chars, tokenizer.chat_ids, chat, text, max_tokens)

    async def _chat(
        self, request: ChatRequest, use: ToolUse | None, tokenizer: TextTokenizer, adapter: str | None
    ) -> tuple[list[int], ToolPlan | None]:
        if use is None:
            return await self.chat_ids(request, tokenizer, ()), None
        format = choose_format(tokenizer.chat_template, self.config.tool_format).format
        marks = Marks(*tokenizer.added_tokens(markers(format)))
        plan = await asyncio.to_thread(make_plan, use, format, marks, adapter)
        return await self.chat_ids(request, tokenizer, all_tools(request.tools)), plan

    async def _load_tool_adapters(self, use: ToolUse | None) -> None:
        """Load what the tools name before anything is generated, so that what is missing is a plain error."""
        for tool in use.tools if use is not None else ():
            if tool.adapter is None:
                continue
            try:
                await self.store.resolve(tool.adapter)
            except UserError as error:
                message = f"x-adapter of tool {tool.name!r}: {error}"
                raise UserError(message, param="tools", code=error.code, status=error.status) from None

    async def _prediction(self, request: GenerationFields, tokenizer: TextTokenizer) -> list[int]:
        if request.prediction is None:
            return []
        text, limit = joined(request.prediction.content), self.engine.info.max_model_len
        tokenizer.check_len([text], limit, "prediction")
        return (await self.off_loop(len(text), tokenizer.encode_literal, text))[:limit]

    async def run(self, job: Job) -> AsyncGenerator[tuple[int, Delta]]:
        """Deltas of all choices as they come. Raises `UserError`; leaving the iterator aborts what still runs."""
        queue: asyncio.Queue[tuple[int, Delta | BaseException]] = asyncio.Queue(maxsize=64)

        async def pump(idx: int, request: GenerateRequest) -> None:
            try:
                async with aclosing(self._choice(job, request)) as deltas:
                    async for delta in deltas:
                        await queue.put((idx, delta))
            except Exception as error:
                await queue.put((idx, error))

        tasks = [asyncio.create_task(pump(idx, request)) for idx, request in enumerate(job.requests)]
        watch = self.metrics.watch(job.adapter or self.model_name, num_sequences=len(tasks))
        line = RequestLine(job.id, job.adapter or self.model_name, len(tasks))
        num_running = len(tasks)
        try:
            async with asyncio.timeout(self.config.request_timeout_s):
                while num_running:
                    idx, item = await queue.get()
                    if isinstance(item, BaseException):
                        raise item
                    num_running -= item.finish_reason is not None
                    watch.delta(idx, item)
                    line.delta(item)
                    yield idx, item
        except UserError as error:
            line.failed(error.code or error.type)
            raise
        except TimeoutError:
            line.failed("timeout")
            raise UserError(
                f"the request took longer than {self.config.request_timeout_s:g} s (--request-timeout-s)",
                status=504,
                code="timeout",
            ) from None
        except Exception:
            line.failed("internal_error")
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            watch.done()
            line.ended()

    def _choice(self, job: Job, request: GenerateRequest) -> AsyncGenerator[Delta]:
        """One sequence, or several as one where tools bring adapters."""
        if job.tools is None or not job.tools.switching:
            return self._one(request, job.adapter, job.adapter_info)
        eos_token_ids = frozenset(self.engine.info.eos_token_ids)
        return run_switching(job.tools, request, job.adapter, eos_token_ids, self._one_with)

    async def _one_with(self, request: GenerateRequest, adapter: str | None) -> AsyncGenerator[Delta]:
        """One sequence with the adapter of that name, whatever `request` holds."""
        content_hash = None if adapter is None else (await self.store.resolve(adapter)).content_hash
        request = msgspec.structs.replace(request, adapter_hash=content_hash)
        async with aclosing(self._one(request, adapter, None)) as deltas:
            async for delta in deltas:
                yield delta

    async def _one(
        self, request: GenerateRequest, adapter: str | None, prompted: AdapterInfo | None
    ) -> AsyncGenerator[Delta]:
        """One sequence; when its adapter had to make room meanwhile, or went with its engine, it is loaded again.

        `prompted` is the adapter whose chat template and tokenizer made the prompt, if it did: they must be the same.
        """
        losses = Losses()
        for attempt in range(MAX_RELOADS + 1):
            try:
                async with aclosing(self._resender.generate(request, losses)) as deltas:
                    async for delta in deltas:
                        yield delta
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
            self.store.forget(adapter, request.adapter_hash)
            now = await self.store.resolve(adapter)
            if prompted is not None and now.text_hash != prompted.text_hash:
                raise UserError(
                    f"adapter {adapter!r} got another chat template or tokenizer while the request waited for it; "
                    "send the request again",
                    status=409,
                    code="adapter_changed",
                )
            request = msgspec.structs.replace(request, adapter_hash=now.content_hash)


def thinking_of(tokenizer: TextTokenizer, prompt_ids: Sequence[int], plan: ToolPlan | None) -> Thinking | None:
    """How the answer to a chat's prompt may think; None: not at all."""
    if not may_think(tokenizer.chat_template, tokenizer.added_tokens({THINK, THINK_END})[0]):
        return None
    is_open = tokenizer.decode(prompt_ids[-32:]).rstrip().endswith(THINK)
    return Thinking(is_open, (plan.format.marker,) if plan is not None and plan.format.marker else ())


def text_len(prompt: str | list[Any]) -> int:
    """The characters of all texts in a prompt."""
    return len(prompt) if isinstance(prompt, str) else sum(len(item) for item in prompt if isinstance(item, str))
