"""The OpenAI routes: completions, chat completions, models, and tokenisation beside them."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import Any

from aiohttp import web

from ...chat.tools.definitions import all_tools
from ...errors import UserError
from ..access.caller import Caller, caller_of
from ..generation.generator import Generator
from ..generation.job import Job
from ..http_body import convert, json_response, read_body
from ..lorax.types import LoraxTokenizeRequest, SimpleToken
from ..route import Answer, Handler
from ..sse import EventStream, stream_events
from .request_types import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .responses import ResponseBuilder


class OpenAIRoutes:
    """Handlers over one `Generator`."""

    def __init__(self, generator: Generator):
        self._generator = generator
        self._started = int(time.time())

    def handlers(self) -> dict[str, Handler]:
        """Handlers by the names that the route table gives them."""
        return {
            "completions": self.completions,
            "chat_completions": self.chat_completions,
            "models": self.models,
            "model": self.model,
            "tokenize": self.tokenize,
            "detokenize": self.detokenize,
        }

    def answers(self) -> dict[str, Answer]:
        """Whole answers by path, for requests that come without HTTP. They raise `UserError`."""
        return {
            "/v1/completions": lambda value, caller: self._answer(convert(value, CompletionRequest), caller),
            "/v1/chat/completions": lambda value, caller: self._answer(convert(value, ChatRequest), caller),
        }

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, CompletionRequest)

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, ChatRequest)

    async def models(self, request: web.Request) -> web.Response:
        caller, store = caller_of(request), self._generator.store
        names = [None, *(name for name in await store.look(store.names) if caller.may_use(name))]
        return json_response({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: web.Request) -> web.Response:
        name = self._generator.adapter_name(caller_of(request), request.match_info["model"])
        if name is not None:
            await self._generator.store.check_known(name)
        return json_response(self._model(name))

    async def tokenize(self, request: web.Request) -> web.Response:
        value = await read_body(request, self._generator.config)
        if isinstance(value, dict) and "inputs" in value:
            request["errors"] = "lorax"
            return await self._tokenize_inputs(convert(value, LoraxTokenizeRequest))
        body = convert(value, TokenizeRequest)
        if (body.prompt is None) == (body.messages is None):
            raise UserError("send either prompt or messages", param="prompt")
        generator = self._generator
        tokenizer, _ = await generator.prompts.tokenizer_for(generator.adapter_name(caller_of(request), body.model))
        if body.messages is not None:
            ids = await generator.prompts.chat_ids(body, tokenizer, all_tools(body.tools))
        else:
            if body.continue_final_message:
                raise UserError("continue_final_message goes with messages", param="continue_final_message")
            text = body.prompt or ""
            tokenizer.check_len([text], generator.engine.info.max_model_len, "prompt")
            ids = await generator.prompts.read(tokenizer, len(text), tokenizer.encode, text, body.add_special_tokens)
        result: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": generator.engine.info.max_model_len,
            "tokens": ids,
            "token_strs": await asyncio.to_thread(tokenizer.token_texts, ids) if body.return_token_strs else None,
        }
        return json_response(result)

    async def _tokenize_inputs(self, body: LoraxTokenizeRequest) -> web.Response:
        """LoRAX's /tokenize: the base model's tokens and the characters that they stand for."""
        prompts, text = self._generator.prompts, body.inputs
        prompts.tokenizer.check_len([text], self._generator.engine.info.max_model_len, "inputs")
        special = body.add_special_tokens is not False
        tokens = await prompts.read(prompts.tokenizer, len(text), prompts.tokenizer.encode_with_offsets, text, special)
        return json_response([SimpleToken(*token) for token in tokens])

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await self._body(request, DetokenizeRequest)
        generator = self._generator
        vocab_size = generator.engine.info.vocab_size
        bad = next((token for token in body.tokens if not 0 <= token < vocab_size), None)
        if bad is not None:
            raise UserError(f"tokens: token id {bad} is outside 0..{vocab_size - 1}", param="tokens")
        tokenizer, _ = await generator.prompts.tokenizer_for(generator.adapter_name(caller_of(request), body.model))
        return json_response({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)})

    def _model(self, adapter: str | None) -> dict[str, Any]:
        base = self._generator.model_name
        return {
            "id": adapter or base,
            "object": "model",
            "created": self._started,
            "owned_by": "specserve",
            "root": adapter or base,
            "parent": None if adapter is None else base,
            "max_model_len": self._generator.engine.info.max_model_len,
        }

    async def _body(self, request: web.Request, kind: Any) -> Any:
        return convert(await read_body(request, self._generator.config), kind)

    async def _generate(self, request: web.Request, kind: Any) -> web.StreamResponse:
        body = await self._body(request, kind)
        if not body.stream:
            job = await self._prepare(body, caller_of(request))
            return json_response(await self._whole(job), headers=job.headers)
        return await self._stream(request, await self._generator.prepare(body, caller_of(request)))

    async def _answer(self, body: CompletionRequest | ChatRequest, caller: Caller) -> Any:
        """Whole, whatever `stream` says."""
        return await self._whole(await self._prepare(body, caller))

    async def _prepare(self, body: CompletionRequest | ChatRequest, caller: Caller) -> Job:
        if body.stream_options is not None and not body.stream:
            raise UserError("stream_options needs stream=true", param="stream_options")
        return await self._generator.prepare(body, caller)

    async def _whole(self, job: Job) -> Any:
        builder = ResponseBuilder(job)
        async with aclosing(self._generator.deltas(job)) as deltas:
            async for idx, delta in deltas:
                builder.add(idx, delta)
        return builder.whole()

    async def _stream(self, request: web.Request, job: Job) -> web.StreamResponse:
        stream = EventStream(request, job.headers)
        return await stream_events(stream, self._generator.deltas(job), ResponseBuilder(job), b"data: [DONE]\n\n")
