"""Answers as handlers of routes: a body in, JSON out, and the bodies of another API on the same path told apart.

The address may name the model, too: clients of servers with one model have no field for it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from ...config import ServeConfig
from ...errors import UserError
from ..access.caller import caller_of
from ..http_body import convert, json_response, read_body
from ..route import Answer, Handler
from .request_types import ModelQuery


def handler_of(config: ServeConfig, answer: Answer, other_field: str = "", other: Answer | None = None) -> Handler:
    """`other` answers bodies that have `other_field`, with errors in LoRAX's shape."""

    async def handle(request: web.Request) -> web.Response:
        caller = caller_of(request)
        value = _named(await read_body(request, config), convert(dict(request.query), ModelQuery))
        if other is not None and isinstance(value, dict) and other_field in value:
            request["errors"] = "lorax"
            found = await other(value, caller)
        else:
            found = await answer(value, caller)
        return await asyncio.to_thread(json_response, found)  # it may be long: 2048 embeddings are 25 MB

    return handle


def _named(value: Any, query: ModelQuery) -> Any:
    """The body, for the model that the address names. Raises `UserError` where both name one, and not the same."""
    if query.model is None or not isinstance(value, dict):
        return value
    if value.get("model") not in (None, query.model):
        raise UserError(
            f"the address names the model {query.model[:128]!r} and the body another one; name one", param="model"
        )
    return {**value, "model": query.model}
