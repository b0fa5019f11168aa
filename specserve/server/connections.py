"""Connections within what the process may open: raised limits, a bound, and peers that do not speak HTTP.

Owns the sockets from `bind` to a request. When all places are taken, the longest idle connection makes room for a
new one; when none is idle, which a new one is not yet, it gets a 503. Errors before there is a request are JSON as all
others are, and one line of log, however many there are. A client that ends its own side behind its request gets its
answer; one that leaves, which looks alike at first, is found out by what it is sent. A peer that takes nothing of what
it asked for is cut off, so that what it has does not look complete.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import select
import socket
import ssl
import time
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import HttpVersion11, web
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest

from ..errors import ErrorInfo, UserError
from .console import Seldom
from .error_bodies import SAFE_HEADERS, openai_error
from .tls import HANDSHAKE_TIMEOUT_S

logger = logging.getLogger(__name__)

MAX_HANDLES = 65_536  # enough for anyone, and few enough that what goes through all handles of a process stays quick
RESERVED_HANDLES = 128  # adapters and models that are read, the engine's restart, logs
ARRIVAL_S = 0.5  # in which a new connection's request may come, before it counts as idle
REFUSAL_S = 1.0  # in which a refused peer may read why
LOOKS = 4  # at what a peer takes, in the time in which it has to take something
PROBE_S = (0.05, 2.0)  # between bytes to a peer that has ended its side: at first, and at most
PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"  # clients pass over it
ACCEPTED_AT_ONCE = 16  # asyncio accepts so many before the first of them gets a protocol, and so a place


def raise_handle_limit() -> int:
    """Let the process open as many files as it may; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_HANDLES if hard == resource.RLIM_INFINITY else min(hard, MAX_HANDLES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return MAX_HANDLES if soft == resource.RLIM_INFINITY else soft


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises `UserError` when the address is taken or unknown."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot listen on {host}:{port}: {reason}; choose another --port or --host", param="port"
        ) from None
    listener.setblocking(False)
    return listener


class Connections:
    """Gives each accepted socket its protocol; `handler_options` are those of aiohttp's request handlers.

    Who takes nothing for `write_timeout_s` is cut off.
    """

    def __init__(self, server: web.Server, num_handles: int, write_timeout_s: float = 60.0, **handler_options: Any):
        self._server = server
        self._write_timeout_s, self._options = write_timeout_s, handler_options
        self._limit = max(num_handles - RESERVED_HANDLES, num_handles // 2)
        self._max_refusals = (num_handles - self._limit) // 4
        self._refusals: set[_Refusal] = set()
        self._full, self._malformed, self._accept = (Seldom(logger) for _ in range(3))

    async def listen(self, listener: socket.socket, tls: ssl.SSLContext | None = None) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_error)
        handshake_timeout_s = HANDSHAKE_TIMEOUT_S if tls is not None else None
        server = await loop.create_server(
            self._protocol, sock=listener, backlog=ACCEPTED_AT_ONCE, ssl=tls, ssl_handshake_timeout=handshake_timeout_s
        )
        listener.listen(1024)  # what waits in the system is another number
        return server

    def _protocol(self) -> asyncio.Protocol:
        connections = self._server.connections  # the oldest first
        if len(connections) >= self._limit:
            self._full.warn(
                f"{len(connections)} connections are open, as many as the limit of file handles allows; idle ones are "
                "closed for new ones (ulimit -n)"
            )
            idle = next((item for item in connections if isinstance(item, _Connection) and item.is_idle), None)
            if idle is None:
                return _Refusal(self._refusals, self._max_refusals)
            idle.force_close()
        loop = asyncio.get_running_loop()
        return _Connection(self._malformed, self._write_timeout_s, self._server, loop=loop, **self._options)

    def _on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if context["message"].startswith("socket.accept()"):
            self._accept.warn(f"{context['message']}: {context.get('exception')}; new connections wait for a second")
        else:
            loop.default_exception_handler(context)


class _Connection(RequestHandler):
    """aiohttp's connection with errors in this server's shape."""

    __slots__ = ("_giving_up", "_probing", "_seldom", "_since", "_write_timeout_s")

    def __init__(self, seldom: Seldom, write_timeout_s: float, manager: web.Server, **options: Any):
        super().__init__(manager, **options)
        self._seldom, self._write_timeout_s = seldom, write_timeout_s
        self._since = time.monotonic()
        self._probing: asyncio.TimerHandle | None = None
        self._giving_up: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether it waits for a request: none has come that is not answered in full, and nobody has closed it yet.

        One that has only been opened is about to send its request, and one with unread bytes has sent it.
        """
        if not self._waits or self.transport is None:
            return False
        return time.monotonic() - self._since >= ARRIVAL_S and not _polled(self.transport, select.POLLIN)

    @property
    def _waits(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the peer, which sends nothing more, may still read: not if its answer has begun, as who ends his side
        so late has left, and not over TLS, which asyncio closes whole."""
        has_begun = self._current_request is not None and self._current_request.writer.output_size > 0
        if self._waits or has_begun or self.ssl_context is not None:
            return False
        self._probe(PROBE_S[0])
        return True

    def _probe(self, next_s: float) -> None:
        """See whether a peer that has ended its side is still there. The kernel of one that has left refuses what it is
        sent, which only a look at the socket shows; a relay between needs to be sent something once more."""
        request, transport = self._current_request, self.transport
        if transport is None:
            return
        if self._waits:  # all is answered
            self.force_close()
            return
        if request is not None and request.writer.output_size == 0:
            if not request.content.is_eof() or (request.version < HttpVersion11 and request.method == "POST"):
                transport.abort()  # half a request, or a generation for who must not be sent a probe
                return
            if request.version >= HttpVersion11:
                transport.write(PROBE)
        if _polled(transport):
            transport.abort()
            return
        self._probing = asyncio.get_running_loop().call_later(next_s, self._probe, min(2 * next_s, PROBE_S[1]))

    # -- readers that take nothing

    def pause_writing(self) -> None:
        super().pause_writing()
        if self.transport is not None:
            self._give_up_later(self.transport)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel(self._giving_up)

    async def start(self) -> None:
        transport = self.transport
        try:
            await super().start()
        finally:
            if transport is not None and self._manager is not None:  # it is closed when all that is left was taken
                self._give_up_later(transport)

    def _give_up_later(self, transport: asyncio.Transport, num_unread: int = 0, num_looks: int = LOOKS) -> None:
        """Cut the peer off when so many looks in a row find that it took nothing of what waits for it."""

        def look() -> None:
            num = transport.get_write_buffer_size()
            if num < num_unread:
                self._give_up_later(transport, num)
            elif num_looks > 1:
                self._give_up_later(transport, num, num_looks - 1)
            else:
                transport.abort()

        self._cancel(self._giving_up)
        self._giving_up = asyncio.get_running_loop().call_later(self._write_timeout_s / LOOKS, look)

    def _cancel(self, timer: asyncio.TimerHandle | None) -> None:
        if timer is not None:
            timer.cancel()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._cancel(self._probing)
        self._cancel(self._giving_up)
        super().connection_lost(exc)

    def handle_error(
        self, request: BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """A request that could not be read; what handlers raise is answered before it comes here, but for a
        `ConnectionError`: its client has left, so there is nobody to answer and nothing to warn of."""
        if isinstance(exc, ConnectionError):
            raise exc
        reason = (message or HTTPStatus(status).phrase).splitlines()[0][:200]
        fault = f" ({type(exc).__name__}: {exc})" if exc is not None and status >= 500 else ""
        self._seldom.warn(f"a request from {request.remote} cannot be read: {reason!r}{fault}")
        if request.writer.output_size > 0:
            raise ConnectionError("a part of the answer is sent already")
        kind = "server_error" if status >= 500 else "invalid_request_error"
        info = ErrorInfo(f"the request cannot be read: {reason}", status, kind, None, "malformed_http")
        response = web.Response(status=status, body=msgspec.json.encode(openai_error(info)))
        response.content_type = "application/json"
        response.headers.update(SAFE_HEADERS)
        response.force_close()
        return response


def _polled(transport: asyncio.BaseTransport, events: int = 0) -> bool:
    """Whether the socket has any of these events, or is closed or broken."""
    poll = select.poll()  # takes no handle
    poll.register(transport.get_extra_info("socket"), events)
    return bool(poll.poll(0))


class _Refusal(asyncio.Protocol):
    """Says that there is no place, and closes when the peer has, of whom `max_open` are waited for at a time.

    A socket that is closed with bytes of its request unread resets the connection, and the peer never sees the answer.
    """

    def __init__(self, open_now: set[_Refusal], max_open: int):
        self._open_now = open_now
        self._max_open = max_open
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        info = ErrorInfo("all connections are taken; retry shortly", 503, "overloaded_error", None, "overloaded")
        body = msgspec.json.encode(openai_error(info))
        head = "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in SAFE_HEADERS.items())
        head += f"x-should-retry: true\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        transport.write(head.encode() + body)
        if len(self._open_now) >= self._max_open:
            transport.close()
            return
        self._open_now.add(self)
        if transport.can_write_eof():  # TLS cannot
            transport.write_eof()
        self._timer = asyncio.get_running_loop().call_later(REFUSAL_S, transport.close)

    def data_received(self, data: bytes) -> None:
        pass

    def connection_lost(self, exc: Exception | None) -> None:
        self._open_now.discard(self)
        if self._timer is not None:
            self._timer.cancel()
