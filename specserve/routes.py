"""Every HTTP route, once: the table that the server registers and that access rules are read from.

A route names its handler; `add_routes` binds names to methods and refuses a table and handlers that do not match.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path.

    `access`: open to everyone, with the API key, or with the admin key. `errors`: whose error shape it answers with.
    """

    method: Literal["GET", "POST"]
    path: str
    handler: str
    access: Literal["open", "key", "admin"] = "key"
    errors: Literal["openai", "lorax"] = "openai"


ROUTES = (
    Route("POST", "/v1/completions", "completions"),
    Route("POST", "/v1/chat/completions", "chat_completions"),
    Route("GET", "/v1/models", "models"),
    Route("GET", "/v1/models/{model:.+}", "model"),
    Route("POST", "/tokenize", "tokenize"),
    Route("POST", "/detokenize", "detokenize"),
    Route("POST", "/generate", "lorax_generate", errors="lorax"),
    Route("POST", "/generate_stream", "lorax_generate_stream", errors="lorax"),
    Route("POST", "/", "lorax_compat", errors="lorax"),
    Route("GET", "/info", "lorax_info", errors="lorax"),
    Route("POST", "/v1/load_lora_adapter", "load_adapter", "admin"),
    Route("POST", "/v1/unload_lora_adapter", "unload_adapter", "admin"),
    Route("GET", "/health", "health", "open"),
    Route("GET", "/ready", "ready", "open"),
    Route("GET", "/version", "version", "open"),
    Route("GET", "/metrics", "metrics", "open"),
)

ACCESS: dict[str, str] = {route.path: route.access for route in ROUTES}
ERRORS: dict[str, str] = {route.path: route.errors for route in ROUTES}


def add_routes(app: web.Application, handlers: Mapping[str, Handler]) -> None:
    """Register the whole table; `handlers` must hold exactly its handler names."""
    assert set(handlers) == {route.handler for route in ROUTES}, set(handlers) ^ {route.handler for route in ROUTES}
    for route in ROUTES:
        app.router.add_route(route.method, route.path, handlers[route.handler])
