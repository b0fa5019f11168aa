"""The OpenAPI 3.1 document of the route table: schemas come from the msgspec types that requests are decoded with.

Pure: the same table gives the same document. The server builds it once, at start.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from .. import __version__
from .lorax.types import LoraxError
from .openai.response_types import ErrorResponse, StateResponse
from .route import Route
from .routes import ROUTES

DESCRIPTIONS = {
    301: "it is at the address of Location",
    304: "what the client has is current",
    400: "a field that is missing, unknown, out of range or not served; an adapter that cannot be served",
    401: "no valid key",
    403: "this host, origin or path is not allowed",
    404: "no such model, adapter, file or batch",
    408: "the body came too slowly",
    409: "the name is taken, the adapter was replaced meanwhile, the file is in use, or the batch has ended",
    413: "the body is too large",
    415: "the content type or encoding is not accepted",
    422: "a field that is missing, unknown, out of range or not served",
    424: "the adapter or the model failed",
    429: "the server is full; retry after a while",
    500: "a fault of the server",
    502: "an adapter's source fails",
    503: "the engine is starting, the server shuts down, or a disk is away; retry after a while",
    504: "the request took too long",
    507: "the disk of files and batches is full",
}
_VARIABLE = re.compile(r"\{(\w+):[^}]*\}")


def openapi_document(routes: tuple[Route, ...] = ROUTES) -> dict[str, Any]:
    """The document of `routes`, as JSON values."""
    types: list[Any] = [ErrorResponse, LoraxError]
    for route in routes:
        types += [kind for member in (route.body, route.answer, route.events) for kind in _alternatives(member)]
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema_of = {repr(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(public_path(route), {})[route.method.lower()] = _operation(route, schema_of)
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "specserve",
            "version": __version__,
            "description": "One base model, many LoRAs, exact speculation. OpenAI's API and others'.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    as_json: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(document))  # defaults may be tuples
    return as_json


def public_path(route: Route) -> str:
    """The route's path as OpenAPI writes it."""
    return _VARIABLE.sub(r"{\1}", route.path)


def _alternatives(kinds: Any) -> tuple[Any, ...]:
    return () if kinds is None else kinds if isinstance(kinds, tuple) else (kinds,)


def _operation(route: Route, schema_of: dict[str, Any]) -> dict[str, Any]:
    def media(*kinds: Any) -> dict[str, Any]:
        schemas = [schema_of[repr(kind)] for kind in kinds]
        return {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}}

    error: Any = LoraxError if route.errors == "lorax" else ErrorResponse
    content: dict[str, Any] = {}
    if route.answer is not None:
        content["application/json"] = media(*_alternatives(route.answer))
    if route.events is not None:
        data: dict[str, Any] = {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": media(route.events, error)["schema"],
        }
        if route.errors == "openai" and route.method == "POST" and route.has_done:
            data = {"anyOf": [data, {"const": "[DONE]"}]}
        content["text/event-stream"] = {
            "schema": {"type": "object", "properties": {"data": data}, "required": ["data"]}
        }
    content |= dict.fromkeys(route.media, {})
    responses: dict[str, Any] = {"200": {"description": "OK", "content": content or {"text/plain": {}}}}
    for status in sorted(route.statuses):
        if status < 400:
            responses[str(status)] = {"description": DESCRIPTIONS[status]}
            continue
        kinds = [LoraxError if status == 422 else error]
        if isinstance(route.body, tuple) and status != 422:
            kinds.append(LoraxError)
        if route.answer is StateResponse and status == 503:
            kinds = [StateResponse]
        responses[str(status)] = {
            "description": DESCRIPTIONS[status],
            "content": {"application/json": media(*kinds)},
        }
        if status in (429, 503) and route.access != "open":
            responses[str(status)]["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
    operation: dict[str, Any] = {
        "operationId": route.handler,
        "summary": route.summary,
        "tags": [_tag(route)],
        "responses": responses,
        "security": [] if route.access == "open" else [{}, {"key": []}],  # without --api-key none is needed
    }
    if names := _VARIABLE.findall(route.path):
        string = {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": string} for name in names]
    if route.query is not None:
        operation["parameters"] = [*operation.get("parameters", []), *_query_parameters(route.query)]
    if route.body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {route.body_media: media(*_alternatives(route.body))},
        }
    return operation


def _tag(route: Route) -> str:
    if route.errors == "lorax":
        return "LoRAX"
    return "OpenAI" if route.path.startswith("/v1/") and route.access not in ("info", "metrics") else "server"


def _query_parameters(kind: Any) -> list[dict[str, Any]]:
    (_, components) = msgspec.json.schema_components([kind])
    schema = components[kind.__name__]
    required = schema.get("required", ())
    return [
        {"name": name, "in": "query", "required": name in required, "schema": field}
        for name, field in schema["properties"].items()
    ]
