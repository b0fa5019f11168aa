"""One client request as engine requests: every field checked, the prompt tokenised, tools and thinking planned.

What is asked for becomes a `Job`; `deltas` yields (sequence index, delta) as they come from any of its sequences, and
aborts everything that still runs when the client or a timeout ends it early. A job's own adapters are loaded before it
is made, so that what is missing is a plain error.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec

from ...adapter_messages import AdapterInfo
from ...chat.messages import joined
from ...chat.reasoning import Thinking
from ...chat.thinking_marks import ThinkingMarks
from ...chat.tools.definitions import ToolUse, all_tools, tool_use
from ...chat.tools.grammar import Marks
from ...chat.tools.plan import ToolPlan, direct_adapter, make_plan, markers
from ...config import ServeConfig
from ...errors import DeadlineError, UserError
from ...grammar.structured_output import asks_for_grammar, grammar_spec
from ...messages import Delta, GenerateRequest, GrammarSpec, Together
from ...text.tokenizer import TextTokenizer
from ..access.caller import Caller
from ..adapter_store import AdapterStore
from ..engine_client.serving_engine import ServingEngine
from ..metrics.metrics import Metrics
from ..openai.conversion import (
    HasDeadline,
    check_supported,
    choice_counts,
    deadline_s,
    priority_of,
    sampling_params,
    speculation_params,
)
from ..openai.prompt_ids import check_prompt_ids, completion_prompts
from ..openai.request_types import ChatRequest, CompletionRequest
from ..routing.router import Router, said
from ..routing.types import Routing
from ..spans import Spans
from .account import Accounts
from .job import Job
from .job_runner import JobRunner
from .prompts import Prompts, check_generates
from .sequences import Sequences
from .thoughts import opened_by, special_marks, thoughtless_ids

logger = logging.getLogger(__name__)


class Generator:
    """Turns request bodies into jobs and jobs into deltas, for one engine."""

    def __init__(
        self,
        config: ServeConfig,
        engine: ServingEngine,
        store: AdapterStore,
        tokenizer: TextTokenizer,
        model_name: str,
        metrics: Metrics,
        spans: Spans | None = None,
    ):
        self.config = config
        self.engine = engine
        self.store = store
        self.model_name = model_name
        self.prompts = Prompts(engine, store, tokenizer, config.tool_format)
        self.accounts = Accounts(store, model_name, metrics, config.request_timeout_s, spans)
        self.sequences = Sequences(engine, store)
        self._router = Router(store, model_name)
        self._metrics = metrics
        self._runner = JobRunner(engine, store, tokenizer, self.sequences, self.accounts)
        chosen = self.prompts.format_of(tokenizer)
        logger.info("tool calls: %s format (%s)", chosen.format.name, chosen.reason)

    async def close(self) -> None:
        await self.prompts.close()

    def adapter_name(self, caller: Caller, model: str | None, adapter_id: str | None = None) -> str | None:
        """The adapter that a request names through `model` or `adapter_id`; None is the base model.

        Raises `UserError` for one that is not for the caller.
        """
        name = self._adapter_name(model, adapter_id)
        caller.check_adapter(name)
        return name

    def _adapter_name(self, model: str | None, adapter_id: str | None) -> str | None:
        named = None if model in (None, "", self.model_name) else model
        if adapter_id in (None, "", self.model_name):
            return named
        if named is not None and named != adapter_id:
            raise UserError(
                f"model names the adapter {named[:128]!r} and adapter_id {adapter_id!r}; name one", param="adapter_id"
            )
        return adapter_id

    async def prepare(self, request: CompletionRequest | ChatRequest, caller: Caller) -> Job:
        """Check and tokenise a request. Raises `UserError`."""
        async with before_deadline(request) as deadline:
            return await self.prepare_until(deadline, request, caller)

    async def prepare_until(
        self, deadline: float | None, request: CompletionRequest | ChatRequest, caller: Caller
    ) -> Job:
        """The same, within `before_deadline` of what the request was made from."""
        check_supported(request)
        caller.check_priority(request.priority)
        caller.allowance.check_tokens()  # before an adapter is loaded and a text is read
        priority = caller.priority(priority_of(request, self.config))
        grammar = await asyncio.to_thread(grammar_spec, request) if asks_for_grammar(request) else None
        info = await self.engine.first_info()
        use = tool_use(request) if isinstance(request, ChatRequest) else None
        is_auto = await self._router.is_asked(caller, request.model, request.adapter_id)
        named = None if is_auto else self.adapter_name(caller, request.model, request.adapter_id)
        adapter = direct_adapter(use, named)
        await self._load_tool_adapters(use, caller, priority)
        routing: Routing | None = None
        load = partial(self._load, priority=priority)
        if is_auto and adapter is None:
            routing, (tokenizer, adapter_info) = await self._router.route(request, caller, load)
            adapter = routing.adapter
        else:
            tokenizer, adapter_info = await load(adapter)
        plan: ToolPlan | None = None
        thinking: Thinking | None = None
        if isinstance(request, ChatRequest):
            known = self.prompts.marks_of(tokenizer)
            ids, plan = await self._chat(request, use, grammar, tokenizer, adapter, known)
            if plan.words.free_text if plan is not None else grammar is None:
                ends = (plan.format.marker,) if plan is not None and plan.format.marker else ()
                opened = opened_by(tokenizer, ids, known)
                if known and not (request.continue_final_message and opened is None):  # an answer that goes on
                    thinking = Thinking(known, opened, ends)
            elif known and not request.continue_final_message:  # a grammar leaves no room for thoughts
                ids = ids + thoughtless_ids(tokenizer, ids, known)
            prompts: list[tuple[str | None, list[int]]] = [(None, ids)]
        else:
            size = text_len(request.prompt)
            special = request.add_special_tokens is not False
            prompts = await self.prompts.read(
                tokenizer, size, completion_prompts, request.prompt, tokenizer, info, special
            )
        for _, ids in prompts:
            check_prompt_ids(ids, info, tokenizer)
        num_choices, n = choice_counts(request, len(prompts))
        num = n * len(prompts)
        sampling = sampling_params(request, info, [len(ids) for _, ids in prompts])
        if n > num_choices and sampling.logprobs is None:
            sampling = msgspec.structs.replace(sampling, logprobs=0)  # what ranks them
        if plan is not None:
            grammar = plan.grammar
            if tokenizer.is_special(plan.marks.ids.get(plan.format.marker, -1)):
                sampling = msgspec.structs.replace(sampling, skip_special_tokens=False)  # the parser must see it
        if thinking is not None and special_marks(tokenizer, thinking.known):
            sampling = msgspec.structs.replace(sampling, skip_special_tokens=False)
        speculation = speculation_params(request, self.config, num)
        job_id = f"{'chatcmpl' if isinstance(request, ChatRequest) else 'cmpl'}-{uuid.uuid4().hex}"
        prediction = await self._prediction(request, tokenizer, prompts[0][1])
        together = Together(job_id, num, n * sum(len(ids) for _, ids in prompts)) if num > 1 else None
        requests = [
            GenerateRequest(
                request_id=f"{job_id}-{idx}",
                prompt_token_ids=prompts[idx // n][1],
                sampling=sampling,
                adapter_hash=None if adapter_info is None else adapter_info.content_hash,
                cache_salt=caller.cache_salt(request.cache_salt),
                caller=caller.key or "",
                sample_idx=idx % n,
                speculation=speculation,
                prediction_token_ids=prediction,
                grammar=grammar,
                priority=priority,
                deadline=deadline,
                together=together,
                is_first=idx == 0,
            )
            for idx in range(num)
        ]
        name = request.model if request.model and not is_auto else adapter or self.model_name
        if routing is not None:
            logger.info("%s: %s", job_id, said(routing))
            self._metrics.routed_requests.labels(self._metrics.model_label(name)).inc()
        return Job(
            *(job_id, name, adapter, adapter_info, caller, request, tokenizer, prompts),
            *(n, num_choices, requests, names_limit(request), deadline, plan, thinking),
            routing=routing,
        )

    async def _load(self, adapter: str | None, priority: int) -> tuple[TextTokenizer, AdapterInfo | None]:
        tokenizer, info = await self.prompts.tokenizer_for(adapter, priority)
        check_generates(adapter, info)
        return tokenizer, info

    async def _chat(
        self,
        request: ChatRequest,
        use: ToolUse | None,
        grammar: GrammarSpec | None,
        tokenizer: TextTokenizer,
        adapter: str | None,
        known: Sequence[ThinkingMarks],
    ) -> tuple[list[int], ToolPlan | None]:
        if use is None:
            return await self.prompts.chat_ids(request, tokenizer, ()), None
        format = self.prompts.format_of(tokenizer).format
        ids, texts = tokenizer.added_tokens(markers(format))
        marks = Marks(ids, tuple(sorted({*texts, *special_marks(tokenizer, known)})))
        plan = await asyncio.to_thread(make_plan, use, format, marks, adapter, grammar)
        return await self.prompts.chat_ids(request, tokenizer, all_tools(request.tools)), plan

    async def _load_tool_adapters(self, use: ToolUse | None, caller: Caller, priority: int) -> None:
        """Load what the tools name before anything is generated, so that what is missing is a plain error."""
        for tool in use.tools if use is not None else ():
            if tool.adapter is None:
                continue
            try:
                caller.check_adapter(tool.adapter)
                check_generates(tool.adapter, await self.store.resolve(tool.adapter, priority))
            except UserError as error:
                message = f"x-adapter of tool {tool.name!r}: {error}"
                raise UserError(message, param="tools", code=error.code, status=error.status) from None

    async def _prediction(
        self, request: CompletionRequest | ChatRequest, tokenizer: TextTokenizer, prompt: list[int]
    ) -> list[int]:
        if request.prediction is None:
            return []
        text, limit = joined(request.prediction.content), self.engine.info.max_model_len
        tokenizer.check_len([text], limit, "prediction")
        is_answer = isinstance(request, ChatRequest) and not request.continue_final_message
        ids = await self.prompts.read(
            tokenizer, len(text), tokenizer.encode_continued, text, prompt if is_answer else ()
        )
        return ids[:limit]

    def deltas(self, job: Job) -> AsyncGenerator[tuple[int, Delta]]:
        """(sequence index, delta) of all sequences. Raises `UserError`; leaving the iterator aborts what still runs."""
        return self._runner.deltas(job)


@asynccontextmanager
async def before_deadline(request: HasDeadline) -> AsyncIterator[float | None]:
    """A request is prepared within this; its deadline, of time.monotonic(). Raises `DeadlineError` when it passes."""
    limit_s = deadline_s(request)
    if limit_s is None:
        yield None
        return
    deadline = time.monotonic() + limit_s
    try:
        async with asyncio.timeout(limit_s):
            yield deadline
    except TimeoutError:
        raise DeadlineError(
            f"deadline_ms passed after {limit_s:g} s, before the request ran", param="deadline_ms"
        ) from None


def names_limit(request: CompletionRequest | ChatRequest) -> bool:
    newer = request.max_completion_tokens if isinstance(request, ChatRequest) else None
    return request.max_tokens is not None or newer is not None


def text_len(prompt: str | list[Any]) -> int:
    """The characters of all texts in a prompt, or its token ids."""
    return (
        len(prompt)
        if isinstance(prompt, str)
        else sum(len(item) if isinstance(item, str | list) else 1 for item in prompt)
    )
