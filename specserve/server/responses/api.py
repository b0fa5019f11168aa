"""The routes of OpenAI's Responses API: create, and read and delete what was kept.

A request becomes a chat request (`conversion`), so that prompts, sampling, adapters, tools and speculation are one
code. What is kept, and for whom, is decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from aiohttp import web

from ...errors import UserError
from ...messages import Delta
from ...strict_json import decode_json
from ..access.caller import Caller, caller_of
from ..generation.generator import Generator
from ..generation.job import Job
from ..http_body import convert, json_response, read_body
from ..openai.request_types import ChatRequest
from ..route import Answer, Handler
from ..sse import EventStream, stream_events
from .answer import ResponseBuilder
from .conversion import chat_request, in_these_words, input_items
from .input_items import Item
from .request_types import ResponsesRequest
from .response_types import DeletedResponse, Response, mark
from .store import ResponseStore, StoredResponse


class ResponsesRoutes:
    """Handlers over one `Generator`, with the responses that it keeps."""

    def __init__(self, generator: Generator):
        self._generator = generator
        config = generator.config
        self._store = ResponseStore(int(config.store_responses_mib * 2**20), config.store_responses_s)
        self._cleaning: asyncio.TimerHandle | None = None

    def handlers(self) -> dict[str, Handler]:
        """Handlers by the names that the route table gives them."""
        return {"responses": self.create, "response": self.read, "delete_response": self.delete}

    def close(self) -> None:
        if self._cleaning is not None:
            self._cleaning.cancel()

    def answers(self) -> dict[str, Answer]:
        """Whole answers by path, for requests that come without HTTP. They raise `UserError`."""
        return {"/v1/responses": lambda value, caller: self._answer(convert(value, ResponsesRequest), caller)}

    async def create(self, request: web.Request) -> web.StreamResponse:
        body = convert(await read_body(request, self._generator.config), ResponsesRequest)
        job, builder = await self._begin(body, caller_of(request))
        if not body.stream:
            return json_response(await self._whole(job, builder), headers=job.headers)
        stream = EventStream(request, job.headers, mark=mark)
        return await stream_events(stream, self._deltas(job), builder)

    async def _answer(self, body: ResponsesRequest, caller: Caller) -> Response:
        """Whole, whatever `stream` says."""
        return await self._whole(*await self._begin(body, caller))

    async def _whole(self, job: Job, builder: ResponseBuilder) -> Response:
        async with aclosing(self._deltas(job)) as deltas:
            async for _, delta in deltas:
                builder.add(delta)
        return builder.whole()

    async def _begin(self, body: ResponsesRequest, caller: Caller) -> tuple[Job, ResponseBuilder]:
        """The request's job, and what makes a response of it that is kept where it shall be."""
        is_stored = self._is_stored(body)
        kept = self._continued(body, caller)
        chat, items = await asyncio.to_thread(_conversation, body, kept)  # a body may have very many items
        try:
            job = await self._generator.prepare(chat, caller)
        except UserError as error:
            raise in_these_words(error) from None
        job.id = f"resp_{job.id.removeprefix('chatcmpl-')}"

        def keep(response: Response) -> None:
            if is_stored:
                self._keep(caller, response, items)

        return job, ResponseBuilder(job, body, is_stored, keep)

    async def read(self, request: web.Request) -> web.Response:
        for name in request.query:
            raise UserError(
                f"the query's {name[:64]!r} is not supported; leave it out", param=name[:64], code="unsupported"
            )
        response_id = request.match_info["response_id"]
        found = self._store.get(caller_of(request).name, response_id)
        if found is None:
            raise self._unknown(response_id)
        return web.Response(body=found.body, content_type="application/json")

    async def delete(self, request: web.Request) -> web.Response:
        response_id = request.match_info["response_id"]
        if not self._store.delete(caller_of(request).name, response_id):
            raise self._unknown(response_id)
        return json_response(DeletedResponse(response_id))

    async def _deltas(self, job: Job) -> AsyncGenerator[tuple[int, Delta]]:
        try:
            async with aclosing(self._generator.deltas(job)) as deltas:
                async for item in deltas:
                    yield item
        except UserError as error:
            raise in_these_words(error) from None

    # -- what is kept

    def _is_stored(self, body: ResponsesRequest) -> bool:
        """OpenAI keeps a response unless it is told not to; this server does where it keeps any."""
        if body.store and not self._store.is_open:
            raise UserError(
                "store is true, but this server keeps no responses (--store-responses-mib); leave it out, and send "
                "the conversation's items as input",
                param="store",
                code="unsupported",
            )
        return self._store.is_open and body.store is not False

    def _continued(self, body: ResponsesRequest, caller: Caller) -> StoredResponse | None:
        """The response that the request continues."""
        if body.previous_response_id is None:
            return None
        if not self._store.is_open:
            raise UserError(
                "previous_response_id: this server keeps no responses (--store-responses-mib); send the conversation's "
                "items as input",
                param="previous_response_id",
                code="unsupported",
            )
        found = self._store.get(caller.name, body.previous_response_id)
        if found is None:
            raise UserError(
                f"previous_response_id {body.previous_response_id[:64]!r} is not kept here, or no longer; send the "
                "conversation's items as input",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return found

    def _keep(self, caller: Caller, response: Response, items: list[Item]) -> None:
        stored = StoredResponse(
            response.id, msgspec.json.encode(response), msgspec.json.encode([*items, *response.output])
        )
        response.store = self._store.put(caller.name, stored)
        if self._cleaning is None:
            self._clean()

    def _clean(self) -> None:
        """Forget what is old, now and whenever something becomes so."""
        wait_s = self._store.forget_old()
        self._cleaning = None
        if wait_s is not None:
            self._cleaning = asyncio.get_running_loop().call_later(wait_s, self._clean)

    def _unknown(self, response_id: str) -> UserError:
        why = "" if self._store.is_open else "; this server keeps none (--store-responses-mib)"
        return UserError(
            f"no response {response_id[:64]!r} is kept here{why}", param="response_id", status=404, code="not_found"
        )


def _conversation(body: ResponsesRequest, kept: StoredResponse | None) -> tuple[ChatRequest, list[Item]]:
    """The chat request, and all items of its conversation; the instructions of what it continues are not among them."""
    own = input_items(body)
    earlier: list[Item] = [] if kept is None else decode_json(kept.items)
    items = [*earlier, *own]
    return chat_request(body, items, len(earlier)), items
