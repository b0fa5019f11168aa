"""Whom `specserve chat` talks to: a server by its address, or an engine of its own; one kind of bodies and chunks.

Owns the connection: leaving a stream closes it, which ends the request there. Standard library only, so that a chat
with a server begins at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import msgspec

from ..errors import UserError

if TYPE_CHECKING:
    from ..llm.llm import LLM

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 600.0  # to an answer's next piece


class Backend(Protocol):
    """What a chat needs."""

    @property
    def place(self) -> str:
        """Where it is, in a word."""

    def models(self) -> list[str]:
        """The base model, and its adapters. Raises `UserError`."""

    def stats(self) -> dict[str, Any]:
        """As GET /v1/stats. Raises `UserError`."""

    def chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of a chat's stream; raises `UserError`. Closing the iterator ends the request."""


class ServerBackend:
    """A server at `url`, with or without /v1 at its end. Raises `UserError` for what is no address."""

    def __init__(self, url: str, api_key: str | None):
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # brackets without an IPv6 address in them, or a port that is no number
            is_address = False
        if not is_address:
            raise UserError(f"--url {url!r} is no address of a server; give one such as http://127.0.0.1:8000")
        assert parts.hostname is not None
        self.place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        self._is_tls, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def models(self) -> list[str]:
        return [str(model["id"]) for model in self._json("/v1/models").get("data", [])]

    def stats(self) -> dict[str, Any]:
        return self._json("/v1/stats")

    def chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with closing(self._connect()) as connection:
            response = self._send(connection, "POST", "/v1/chat/completions", json.dumps(body).encode())
            try:
                while line := response.readline():
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    chunk = _decoded(data, self.place)
                    if "error" in chunk:
                        raise _error(chunk, 500, self.place)
                    yield chunk
            except (OSError, HTTPException) as error:
                raise UserError(f"the connection to {self.place} broke: {_reason(error)}") from None
            raise UserError(f"{self.place} ended the answer in the middle")

    def _json(self, path: str) -> dict[str, Any]:
        with closing(self._connect()) as connection:
            return _decoded(self._send(connection, "GET", path).read(), self.place)

    def _connect(self) -> HTTPConnection:
        kind = HTTPSConnection if self._is_tls else HTTPConnection
        connection = kind(self._host, self._port, timeout=CONNECT_TIMEOUT_S)
        try:
            connection.connect()
        except OSError as error:
            raise UserError(
                f"cannot reach {self.place}: {_reason(error)}; start a server there (specserve serve), or leave out "
                "--url to chat without one"
            ) from None
        assert connection.sock is not None
        connection.sock.settimeout(READ_TIMEOUT_S)
        return connection

    def _send(self, connection: HTTPConnection, method: str, path: str, body: bytes | None = None) -> HTTPResponse:
        try:
            connection.request(method, self._prefix + path, body, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise _error(_decoded(response.read(), self.place), response.status, self.place)
        except (OSError, HTTPException) as error:
            raise UserError(f"the connection to {self.place} broke: {_reason(error)}") from None
        return response


class EngineBackend:
    """An engine that this command has started."""

    place = "an engine of its own"

    def __init__(self, llm: LLM):
        self._llm = llm

    def models(self) -> list[str]:
        return [self._llm.model_name, *self._llm.adapter_names()]

    def stats(self) -> dict[str, Any]:
        return msgspec.to_builtins(self._llm.stats())

    def chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for chunk in self._llm.chat_chunks(body):
            yield msgspec.to_builtins(chunk)


def _decoded(data: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{place} answers something else than an OpenAI API does: {data[:80]!r}")
    return value


def _error(body: dict[str, Any], status: int, place: str) -> UserError:
    error = body.get("error")
    fields = error if isinstance(error, dict) else {"message": str(error or body)[:200]}
    message = str(fields.get("message", ""))
    if status == 401:
        message += " (--api-key, or SPECSERVE_API_KEY)"
    return UserError(f"{place}: {message}", param=fields.get("param"), code=fields.get("code"), status=status)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
