"""Reads request bodies within limits of size and time, as the types that routes expect, and writes JSON responses."""

from __future__ import annotations

import asyncio
import re
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from aiohttp import web

from ..config import ServeConfig
from ..errors import UserError, shortened
from ..strict_json import decode_json

T = TypeVar("T")

OFF_LOOP_BYTES = 64 * 1024  # larger bodies are parsed on a thread

_PATH = re.compile(r" - at `\$?\.?(?P<path>[^`]*)`$")
_INDEX = re.compile(r"\[[^\]]*\]")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>[^`]*)`")
_MISSING = re.compile(r"Object missing required field `(?P<name>[^`]*)`")


async def read_body(request: web.Request, config: ServeConfig) -> Any:
    """The body as JSON, within the limits of the settings. Raises `UserError` as `read_json`."""
    return await read_json(request, int(config.max_body_mib * 2**20), config.read_timeout_s)


async def read_json(request: web.Request, max_bytes: int, timeout_s: float) -> Any:
    """The body as JSON. Raises `UserError` with status 408, 413, 415 or 400."""
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UserError("compressed request bodies are not accepted; send plain JSON", status=415)
    if request.content_type != "application/json":
        raise UserError(f"the content type is {request.content_type[:100]!r}; send application/json", status=415)
    too_large = UserError(
        f"the request body is larger than {max_bytes} bytes (--max-body-mib)", status=413, code="body_too_large"
    )
    if request.content_length is not None and request.content_length > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise UserError(
            f"the request body did not arrive within {timeout_s:g} s (--read-timeout-s)", status=408, code="timeout"
        ) from None
    if len(body) > OFF_LOOP_BYTES:
        return await asyncio.to_thread(decode_json, bytes(body))
    return decode_json(bytes(body))


def convert(value: Any, kind: type[T]) -> T:
    """`value` as `kind`; what does not fit is a `UserError` that names the field."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        path = match["path"] if (match := _PATH.search(text)) else ""
        text = _PATH.sub("", text)
        for pattern, say in ((_UNKNOWN, "unknown field {}"), (_MISSING, "the field {} is required")):
            if match := pattern.search(text):
                name = ".".join(part for part in (path, match["name"]) if part)[:200]
                raise UserError(say.format(repr(name)), param=name) from None
        text = shortened(text)
        if text.startswith("Invalid enum value") and (choices := _choices(kind, path)):
            text = f"{text}; one of {', '.join(map(repr, choices))} is expected"
        raise UserError(f"{path or 'the request body'}: {text}", param=path or None) from None


def _choices(kind: Any, path: str) -> list[Any]:
    """The values that the field of this path may have, where there are only a few."""
    leaves = [kind]
    for name in _INDEX.sub("", path).split("."):
        structs = [leaf for leaf in leaves if isinstance(leaf, type) and issubclass(leaf, msgspec.Struct)]
        leaves = [leaf for struct in structs for leaf in _leaves(get_type_hints(struct).get(name))]
    return [value for leaf in leaves if get_origin(leaf) is Literal for value in get_args(leaf)]


def _leaves(hint: Any) -> list[Any]:
    """The types that a union, list or mapping is made of."""
    if get_origin(hint) is Literal or not get_args(hint):
        return [hint]
    return [leaf for part in get_args(hint) for leaf in _leaves(part)]


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, headers=headers, content_type="application/json"
    )
