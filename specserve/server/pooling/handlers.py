"""Answers as handlers of routes: a body in, JSON out, and the bodies of another API on the same path told apart."""

from __future__ import annotations

import asyncio

from aiohttp import web

from ...config import ServeConfig
from ..access.caller import caller_of
from ..http_body import json_response, read_body
from ..routes import Answer, Handler


def handler_of(config: ServeConfig, answer: Answer, other_field: str = "", other: Answer | None = None) -> Handler:
    """`other` answers bodies that have `other_field`, with errors in LoRAX's shape."""

    async def handle(request: web.Request) -> web.Response:
        value, caller = await read_body(request, config), caller_of(request)
        if other is not None and isinstance(value, dict) and other_field in value:
            request["errors"] = "lorax"
            found = await other(value, caller)
        else:
            found = await answer(value, caller)
        return await asyncio.to_thread(json_response, found)  # it may be long: 2048 embeddings are 25 MB

    return handle
