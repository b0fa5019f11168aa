"""From texts and conversations to token ids: with which tokenizer, and where, so that nobody waits for another's text.

Owns the tokenizers that adapters bring, the processes that render their chat templates, and the thread that reads long
texts. The event loop itself reads short texts only, with the base model's tokenizer: 10 us, where a thread takes 50.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakKeyDictionary

from ...adapter_kinds import GENERATES, check_kind
from ...adapter_messages import AdapterInfo
from ...chat.messages import chat_ending, chat_messages, template_variables
from ...chat.thinking_marks import ThinkingMarks
from ...chat.tools.definitions import Tool
from ...chat.tools.formats import ChosenFormat, choose_format
from ...chat.tools.prompt import for_template
from ...chat.types import Message
from ...errors import UserError
from ...text.chat_template import TEMPLATE_FAILED
from ...text.template_renderer import RENDER_TIMEOUT_S, TemplateRenderer
from ...text.tokenizer import LONG_TEXT, HiddenChat, TextTokenizer
from ..adapter_store import AdapterStore
from ..engine_client.serving_engine import ServingEngine
from ..openai.request_types import ChatRequest, TokenizeRequest
from .thoughts import marks_of

T = TypeVar("T")

SHORT_TEXT = 2048  # characters
MAX_TOOLS_TRIED = 16  # one by one, where a template does not take them
EXPLAIN_S = 5.0  # of a request, in which it is found which of them it does not take
MAX_TOKENIZERS = 64  # of adapters; others are read again


class Prompts:
    """Tokenises for one server, whose base model has `tokenizer`; `tool_format` is --tool-format."""

    def __init__(self, engine: ServingEngine, store: AdapterStore, tokenizer: TextTokenizer, tool_format: str):
        self.tokenizer = tokenizer
        self._engine = engine
        self._store = store
        self._tool_format = tool_format
        self._templates = TemplateRenderer()
        # One thread, not a lock: a reader goes on when its client leaves, and the next one must wait for that too.
        self._long_texts = ThreadPoolExecutor(max_workers=1, thread_name_prefix="long text")
        self._formats: WeakKeyDictionary[TextTokenizer, ChosenFormat] = WeakKeyDictionary()
        self._marks: WeakKeyDictionary[TextTokenizer, tuple[ThinkingMarks, ...]] = WeakKeyDictionary()
        self._adapter_tokenizers: OrderedDict[str, TextTokenizer] = OrderedDict()  # by text hash, latest use last

    async def close(self) -> None:
        self._long_texts.shutdown(wait=False, cancel_futures=True)
        await self._templates.close()

    def format_of(self, tokenizer: TextTokenizer) -> ChosenFormat:
        """How the model of this tokenizer writes tool calls."""
        if tokenizer not in self._formats:
            self._formats[tokenizer] = choose_format(tokenizer.template.text, self._tool_format)
        return self._formats[tokenizer]

    def marks_of(self, tokenizer: TextTokenizer) -> tuple[ThinkingMarks, ...]:
        """The marks of what it thinks."""
        if tokenizer not in self._marks:
            self._marks[tokenizer] = marks_of(tokenizer)
        return self._marks[tokenizer]

    async def tokenizer_for(self, adapter: str | None, priority: int = 0) -> tuple[TextTokenizer, AdapterInfo | None]:
        """The tokenizer to use, and the loaded adapter; loads the adapter if needed, for a request of `priority`."""
        if adapter is None:
            return self.tokenizer, None
        info, files = await self._store.resolve_with_texts(adapter, self._adapter_tokenizers, priority)
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

    async def read(self, tokenizer: TextTokenizer, num_chars: float, read: Callable[..., T], *args: object) -> T:
        """`read(*args)` on a thread, or here where that is sooner done: a text of `num_chars` with `tokenizer`.

        Long texts one after the other: each takes 60 times its size while it is read.
        """
        if num_chars <= SHORT_TEXT and tokenizer is self.tokenizer:
            return read(*args)
        if num_chars <= LONG_TEXT:
            return await asyncio.to_thread(read, *args)
        return await asyncio.get_running_loop().run_in_executor(self._long_texts, read, *args)

    async def chat_ids(
        self, request: ChatRequest | TokenizeRequest, tokenizer: TextTokenizer, tools: Sequence[Tool]
    ) -> list[int]:
        """The conversation's token ids; `tools` are described to the model. Raises `UserError`."""
        explained_by = asyncio.get_running_loop().time() + EXPLAIN_S
        try:
            return await self._chat_ids(request, tokenizer, tools)
        except UserError as error:
            if error.code != TEMPLATE_FAILED or not tools:
                raise
            try:
                async with asyncio.timeout_at(explained_by):
                    bad = await self._not_taken(request, tokenizer, tools)
            except TimeoutError:
                bad = None
            if bad is None:
                raise
            raise UserError(
                f"{error}; what it cannot take is {bad}: it may want a description, or know fewer types of parameters",
                param="tools",
                code=TEMPLATE_FAILED,
            ) from None

    async def _not_taken(
        self, request: ChatRequest | TokenizeRequest, tokenizer: TextTokenizer, tools: Sequence[Tool]
    ) -> str | None:
        """Which of the tools the template fails at; None where it fails without tools, too."""
        if not await self._is_made(request, tokenizer, ()):
            return None
        bad = [
            f"tools[{idx}] ({tool.name!r})"
            for idx, tool in enumerate(tools[:MAX_TOOLS_TRIED])
            if not await self._is_made(request, tokenizer, [tool])
        ]
        return ", ".join(bad) or "these tools together"

    async def _is_made(
        self, request: ChatRequest | TokenizeRequest, tokenizer: TextTokenizer, tools: Sequence[Tool]
    ) -> bool:
        """Whether the template takes the conversation with these tools."""
        try:
            await self._chat_ids(request, tokenizer, tools)
        except UserError as error:
            return error.code != TEMPLATE_FAILED
        return True

    async def _chat_ids(
        self, request: ChatRequest | TokenizeRequest, tokenizer: TextTokenizer, tools: Sequence[Tool]
    ) -> list[int]:
        chosen = self.format_of(tokenizer)

        def prepare() -> HiddenChat:
            messages, definitions = for_template(chat_messages(request.messages or []), tools, chosen)
            effort = request.reasoning_effort if isinstance(request, ChatRequest) else None
            variables = template_variables(request.chat_template_kwargs, effort)
            return tokenizer.template.hidden_chat(messages, *chat_ending(request), definitions, variables)

        num_chars = math.inf if tools else _num_chars(request.messages or [])
        return await self.rendered_ids(tokenizer, prepare, self._engine.info.max_model_len, num_chars)

    async def rendered_ids(
        self, tokenizer: TextTokenizer, prepare: Callable[[], HiddenChat], max_tokens: int | None, num_chars: float
    ) -> list[int]:
        """Token ids of a conversation of `num_chars`, rendered where its template may do no harm."""
        template = tokenizer.template
        num_chars = min(num_chars, LONG_TEXT)  # before it is rendered a text takes no more than its size
        if template.is_trusted:

            def render() -> tuple[HiddenChat, str]:
                chat = prepare()
                return chat, template.render_chat(chat)

            chat, text = await self.read(tokenizer, num_chars, render)
        else:
            chat = await asyncio.to_thread(prepare)
            text = await self._templates.render(template.job(chat, RENDER_TIMEOUT_S), template.name)
        size = len(text) + chat.marks.num_chars
        return await self.read(tokenizer, size, tokenizer.chat_ids, chat, text, max_tokens)


def _num_chars(messages: Sequence[Message]) -> float:
    """Of plain texts; of anything else without end."""
    if any(message.tool_calls or not isinstance(message.content, str) for message in messages):
        return math.inf
    return sum(len(message.content or "") for message in messages)


def check_same_texts(name: str | None, prompted: AdapterInfo | None, now: AdapterInfo | None) -> None:
    """Raises `UserError` (409) where a prompt was made by the template and tokenizer of `prompted`, which are not
    those that `name` brings now."""
    if prompted is not None and (now is None or now.text_hash != prompted.text_hash):
        raise UserError(
            f"adapter {name!r} got another chat template or tokenizer while the request waited for it; "
            "send the request again",
            status=409,
            code="adapter_changed",
        )


def check_generates(name: str | None, info: AdapterInfo | None) -> None:
    """Raises `UserError` for an adapter that is for something else, with where that is to be had."""
    if name is not None and info is not None:
        check_kind(name, info.adapter_type, GENERATES)
