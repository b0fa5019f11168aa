"""Errors as bodies, in OpenAI's shape and in LoRAX's; which one a request gets, its route and its body say.

Used by whoever answers: the routes, what surrounds them, and connections that carry no request yet.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web

from ..errors import ErrorInfo
from .http_body import json_response
from .lorax.types import LoraxError
from .routes import ERRORS

# Of every response: bodies are what they say they are, and the versions of libraries are nobody's business.
SAFE_HEADERS = {"X-Content-Type-Options": "nosniff", "Server": "specserve"}
LORAX_TYPES = {
    401: "authentication",
    403: "authentication",
    404: "generation",  # an adapter that does not exist: LoRAX fails while it loads one
    424: "generation",
    429: "overloaded",
    500: "incomplete_generation",
    503: "incomplete_generation",
    504: "incomplete_generation",
}


def openai_error(info: ErrorInfo) -> dict[str, Any]:
    return {"error": {"message": info.message, "type": info.type, "param": info.param, "code": info.code}}


def lorax_error(info: ErrorInfo) -> tuple[int, LoraxError]:
    """(status, body) in LoRAX's shape: bad input is 422, an adapter or a model that fails or changes is 424."""
    status = info.status
    if info.code in ("invalid_adapter", "adapter_changing", "adapter_changed", "model_failure"):
        status = 424
    elif status in (400, 409):
        status = 422
    prefix = "Input validation error: " if status == 422 else ""
    return status, LoraxError(prefix + info.message, LORAX_TYPES.get(status, "validation"))


def error_response(request: web.Request, info: ErrorInfo, headers: dict[str, str] | None = None) -> web.Response:
    """`info` in OpenAI's shape, or in LoRAX's on its routes and where a handler has seen that the body is LoRAX's."""
    if request.get("errors", ERRORS.get(request.path)) == "lorax":
        status, body = lorax_error(info)
        return json_response(body, status, headers)
    return json_response(openai_error(info), info.status, headers)
