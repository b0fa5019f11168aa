"""What surrounds every request: counting, errors as JSON, access, and admission.

Outermost first, in this order. Owns the number of requests in flight and whether the server drains; knows no route's
meaning. Nothing of a body is read before host, origin and key were checked.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import web

from ..config import ServeConfig
from ..errors import ErrorInfo, OverloadedError, ShuttingDownError, UserError
from .access import check_key, host_allowed, is_loopback, origin_allowed
from .error_bodies import error_response
from .metrics import Metrics
from .routes import Handler, access_of

logger = logging.getLogger(__name__)

RETRY_HEADERS = {"Retry-After": "1", "x-should-retry": "true"}
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=\-]{1,128}")


class Middlewares:
    """The middlewares of one server."""

    def __init__(self, config: ServeConfig, metrics: Metrics):
        self._config = config
        self._metrics = metrics
        self.draining = False
        self.num_in_flight = 0

    def all(self) -> list[Callable[..., Awaitable[web.StreamResponse]]]:
        return [self.count, self.errors, self.access, self.admit]

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Before any headers leave, a stream's and an error's too: the request's id and the CORS grant."""
        sent = request.headers.get("X-Request-Id", "")
        response.headers["X-Request-Id"] = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        response.headers.update(request.get("cors", {}))

    @web.middleware
    async def count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "unknown"
        status = 499  # the client left before there was an answer
        self._metrics.in_flight.inc()
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            self._metrics.in_flight.dec()
            self._metrics.requests.labels(route, str(status)).inc()

    @web.middleware
    async def errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every error in its route's shape, and none that tells more than it should."""
        try:
            return await handler(request)
        except UserError as error:
            headers = RETRY_HEADERS if error.status in (429, 503) else None
            response = error_response(request, error.info(), headers)
            if error.status in (408, 413):
                response.force_close()  # the rest of the body is not worth waiting for
            return response
        except web.HTTPException as error:
            message = f"{request.method} {request.rel_url.raw_path[:200]}: {error.reason}"  # raw: nothing unprintable
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
            return error_response(request, ErrorInfo(message, error.status), headers)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("%s %s failed", request.method, request.rel_url.raw_path)
            info = ErrorInfo("internal error; the server's log says more", 500, "server_error", None, "internal_error")
            return error_response(request, info)

    @web.middleware
    async def access(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Host, Origin and keys, before anything of the request is read."""
        config, origin = self._config, request.headers.get("Origin")
        access = access_of(request.method, request.path)
        if not host_allowed(request.headers.get("Host", ""), config):
            raise UserError("this Host is not served here (--allowed-hosts)", status=403, code="host_not_allowed")
        cors = {}
        if origin is not None and access != "open":
            if not origin_allowed(origin, request.headers.get("Host", ""), config):
                raise UserError("this Origin is not allowed (--allowed-origins)", status=403, code="origin_not_allowed")
            cors = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if request.method == "OPTIONS" and origin is not None:
            allow = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": "*"}
            return web.Response(status=204, headers={**cors, **allow})
        request["cors"] = cors
        if access == "admin":
            if config.admin_api_key is None and config.api_key is None and not is_loopback(config.host):
                raise UserError("set --admin-api-key to load adapters from other machines", status=403)
            check_key(request, config.admin_api_key or config.api_key, "admin ")
        elif access != "open":
            check_key(request, config.api_key, "")
        return await handler(request)

    @web.middleware
    async def admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method != "POST":
            return await handler(request)
        if self.draining:
            raise ShuttingDownError("the server is shutting down")
        if self.num_in_flight >= self._config.max_concurrent_requests:
            raise OverloadedError(f"{self.num_in_flight} requests are running; retry shortly")
        self.num_in_flight += 1
        try:
            return await handler(request)
        finally:
            self.num_in_flight -= 1
